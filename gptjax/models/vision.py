"""Images as tokens of a GPT: a vision transformer with a projector, or a linear map of patches.

The vision transformer (Dosovitskiy et al. 2021, section 3.1) has the layers of the GPT with bidirectional attention.
Its settings give CLIP's (Radford et al. 2021, section 2.4) and SigLIP's (Zhai et al. 2023). As in LLaVA (Liu et al.
2023, section 4.1), a projector maps the outputs of one of its layers to the width of the GPT, where they take the
places of the embeddings of image tokens; the GPT then attends to them causally, as to text.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.attention import product_settings
from gptjax.models.elementwise import ACTIVATIONS, Norm, Vector
from gptjax.models.gpt import scanned_layers
from gptjax.models.layer_inputs import LayerInputs
from gptjax.parallel.mesh import constrain, gathered, partitioned


class ImageEncoder(nn.Module):
    """Images to tokens: uint8 (B, N, X) to (B, N * tokens_per_image, D) of the config's dtype.

    X are the rows, columns and channels (red, green, blue) of an image as `gptjax.data.images` makes it, flattened.
    """

    config: GPTConfig  # of the GPT

    @nn.compact
    def __call__(self, images_BNX: jax.Array, deterministic: bool = True) -> jax.Array:
        model, vision = self.config, self.config.vision
        rows, images = images_BNX.shape[:2]
        patches_NPX = normalised_patches(model, images_BNX.reshape(rows * images, -1)).astype(model.dtype)
        if vision.encoder == "patches":
            x_NPD = self._embedded(model, patches_NPX, bias=True)
        else:
            x_NPD = self._projected(self._encoded(patches_NPX, deterministic))
        return constrain(x_NPD.reshape(rows, -1, model.embed_dim), "batch", None, None)

    def _embedded(self, config: GPTConfig, patches_NPX: jax.Array, bias: bool) -> jax.Array:
        """Patches, after the class token if there is one, with their positions; (N, P, width of `config`)."""
        vision, width = self.config.vision, config.embed_dim
        x_NPD = nn.Dense(
            width,
            use_bias=bias,
            kernel_init=partitioned(nn.initializers.lecun_normal(), "patch", "embed", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="patch_embedding",
            **product_settings(config),
        )(patches_NPX)
        init = nn.initializers.normal(config.token_init_std)
        if vision.encoder == "vit" and vision.class_token:
            class_D = Vector(config, "bias", (width,), ("norm",), init, name="class_token")().astype(x_NPD.dtype)
            x_NPD = jnp.concatenate([jnp.broadcast_to(class_D, (len(x_NPD), 1, width)), x_NPD], axis=1)
        positions = nn.Embed(
            x_NPD.shape[1],
            width,
            param_dtype=config.param_dtype,
            embedding_init=partitioned(init, "position", "embed"),
            name="position_embedding",
        )
        return x_NPD + nn.unbox(positions.embedding)[None].astype(x_NPD.dtype)

    def _encoded(self, patches_NPX: jax.Array, deterministic: bool) -> jax.Array:
        """The outputs of the layer that is read, (N, P, width of the encoder)."""
        vision, config = self.config.vision, self.config.image_encoder
        x_NPD = self._embedded(config, patches_NPX, vision.patch_bias)
        if vision.embedding_norm:
            x_NPD = Norm(config, name="embedding_norm")(x_NPD)
        x_NPD = constrain(x_NPD, "batch", "sequence", None)

        def layers(length: int, name: str, x_NPD: jax.Array) -> jax.Array:
            scan = scanned_layers(config, length, deterministic, self.is_initializing(), ring=False, name=name)
            return scan(x_NPD, LayerInputs(), {})[0]

        read = vision.layers_read
        x_NPD = layers(read, "encoder", x_NPD)
        if read < vision.num_layers and self.is_initializing():
            layers(vision.num_layers - read, "unread_encoder", x_NPD)  # kept, so that the tower can be exported
        if vision.final_norm or self.is_initializing():
            normed_NPD = Norm(config, name="final_norm")(x_NPD)
            x_NPD = normed_NPD if vision.final_norm else x_NPD
        x_NPD = gathered(x_NPD)
        return x_NPD[:, 1:] if vision.class_token and not vision.keep_class_token else x_NPD

    def _projected(self, x_NPD: jax.Array) -> jax.Array:
        """(N, P, width of the encoder) to (N, P, width of the GPT)."""
        model = self.config
        dense = partial(
            nn.Dense,
            model.embed_dim,
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            **product_settings(model),
        )
        init = nn.initializers.lecun_normal()
        first = partitioned(init, "embed", None, inputs=1)  # type: ignore[arg-type]
        x_NPD = dense(kernel_init=first, name="projector_1")(x_NPD)
        if model.vision.projector == "mlp":
            second = partitioned(init, None, "embed", inputs=1)  # type: ignore[arg-type]
            x_NPD = dense(kernel_init=second, name="projector_2")(ACTIVATIONS["gelu_exact"](x_NPD))
        return x_NPD


def normalised_patches(model: GPTConfig, images_NX: jax.Array) -> jax.Array:
    """The patches of images in row-major order, (pixel / 255 - mean) / std; uint8 (N, X) to float32 (N, P, X).

    Edge pixels that fill no whole patch are left out, as by a convolution without padding.
    """
    vision = model.vision
    size, patch = vision.image_size, vision.patch_size
    number = size // patch
    pixels = images_NX.reshape(-1, size, size, 3)[:, : number * patch, : number * patch]
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (vision.pixel_mean, vision.pixel_std))
    pixels = (pixels.astype(jnp.float32) / 255 - mean) / std
    pixels = pixels.reshape(-1, number, patch, number, patch, 3).swapaxes(2, 3)
    return pixels.reshape(len(images_NX), vision.num_patches, -1)
