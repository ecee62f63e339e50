"""Models to and from folders in Hugging Face's format: other tools use what is trained here, and we use theirs."""

from __future__ import annotations

from longspan.models.interchange.choose import architecture_of
from longspan.models.interchange.hub import DESCRIPTIONS, FETCHED, resolve
from longspan.models.interchange.read import DTYPES, read_config, read_folder
from longspan.models.interchange.tokenizer_files import read_tokenizer, tokenizer_settings
from longspan.models.interchange.write import Written, exported_tensors, write_folder

__all__ = [
    "DESCRIPTIONS",
    "DTYPES",
    "FETCHED",
    "Written",
    "architecture_of",
    "exported_tensors",
    "read_config",
    "read_folder",
    "read_tokenizer",
    "resolve",
    "tokenizer_settings",
    "write_folder",
]
