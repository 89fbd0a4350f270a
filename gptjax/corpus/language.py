"""Language identification by py3langid, an offline classifier of 139 languages (Lui and Baldwin 2012)."""

import functools
from typing import Any

from gptjax.config import UserError
from gptjax.corpus.recipe import EXTRA
from gptjax.data.packages import require_package

CHARACTERS = 1000  # from the beginning of a document; more take longer, and rarely decide otherwise


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises UserError if a code is not that of a language that can be identified, or py3langid is not installed."""
    require_package("py3langid", EXTRA, "--languages")
    known = sorted(map(str, _identifier().labels))
    for language in languages:
        if language not in known:
            raise UserError(f"--languages: unknown language {language!r}: known are the codes {', '.join(known)}")


def language_of(text: str) -> str:
    """Returns the ISO 639 code of the most probable language of a document."""
    return str(_identifier().classify(text[:CHARACTERS])[0])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
