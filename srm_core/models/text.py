"""Characters to ids and back."""

from __future__ import annotations

from collections.abc import Iterable

from srm_core.errors import VocabularyError


class Vocabulary:
    """An ordered set of characters; a character's id is its place in it."""

    def __init__(self, characters: str) -> None:
        if len(set(characters)) != len(characters) or not characters:
            raise VocabularyError("a vocabulary needs at least one character and holds each one once")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Errors: `VocabularyError` that names the first character that is not here, and where it stands."""
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            at = next(i for i, c in enumerate(text) if c not in self._ids)
            line = text.count("\n", 0, at) + 1
            raise VocabularyError(
                f"the character {text[at]!r} (line {line}) is not in the vocabulary; it has {self.characters!r}"
            ) from None

    def known(self, text: str) -> str:
        """The text without the characters that are not here."""
        return "".join(c for c in text if c in self._ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Errors: `VocabularyError` for an id that is not here."""
        characters = []
        for i in ids:
            if not 0 <= i < len(self.characters):
                raise VocabularyError(f"the id {i} is not in the vocabulary of {len(self.characters)} characters")
            characters.append(self.characters[i])
        return "".join(characters)
