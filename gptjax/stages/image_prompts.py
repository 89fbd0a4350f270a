"""Prompts with images for a trained model: a user's message for a chat model, plain text for others."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptjax.config import Config
from gptjax.data.conversations import Message
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import IMAGE, ImageReference
from gptjax.data.templates import EncodedConversation, chat_format, check_images
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages import registry


class ImagePrompts:
    """Encodes prompts with images, and reads these.

    Args:
      config: complete.
      frames: number of frames of a video; None: data.video_frames.

    Attributes:
      end_tokens: tokens that end a completion, in addition to end-of-text.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, frames: int | None = None) -> None:
        self._vision, self._tokenizer = config.model.vision, tokenizer
        self._files = ImageFiles.of_prompts(config, frames)
        chats = registry.definition(config).chats
        self._format = chat_format(config.chat, tokenizer, self._vision) if chats else None
        self.end_tokens: tuple[int, ...] = () if self._format is None else self._format.end_tokens

    def encode(self, prompt: str, images: Sequence[ImageReference], place: str = "") -> EncodedConversation:
        """Encodes a prompt that has its images where it says `<image>`, or else before its text.

        Raises:
          UserError: an `<image>` too many or too few, or the model reads no images; or a video is damaged.
        """
        if IMAGE not in prompt and images:
            prompt = IMAGE * len(images) + f"\n{prompt}"
        if self._vision.encoder != "none":
            prompt, images = self._files.with_frames(prompt, images)
        message = Message("user", prompt, images=tuple(images))
        if self._format is not None:
            return self._format.encode_prompt_with_images([message], place=place)
        check_images([message], self._vision, place)
        if not images:
            plain = self._tokenizer.encode(prompt).astype(np.int32)
            return EncodedConversation(plain, np.zeros(len(plain), bool))
        first, *others = (self._tokenizer.encode(text).tolist() for text in prompt.split(IMAGE))
        image = [self._vision.image_token] * self._vision.tokens_per_image
        tokens = [*first, *(token for text in others for token in (*image, *text))]
        return EncodedConversation(np.array(tokens, np.int32), np.zeros(len(tokens), bool), tuple(images))

    def check(self, images: Sequence[ImageReference]) -> None:
        """Raises UserError if an image is remote or does not exist; decodes none."""
        self._files.check(list(images))

    def fingerprint(self, image: ImageReference) -> str:
        """As `ImageFiles.fingerprint`."""
        return self._files.fingerprint(image)

    def read(self, images: Sequence[ImageReference]) -> list[npt.NDArray[np.uint8]]:
        """Decodes images as the model reads them; raises UserError if that is not possible."""
        return self._files.read_all(images)
