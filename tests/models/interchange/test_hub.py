"""A name is a folder, or a hub id that is fetched once and then found offline; anything else is said at once."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.foundation.extras import MissingExtra
from longspan.models.interchange import read_folder, resolve

from .conftest import case

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(UserError, match="revision 'main' for the folder"):
        resolve(tmp_path, "main")


def test_what_was_fetched_is_found_offline(cache, written):
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(written("AA"), repository / "snapshots" / COMMIT)
    for revision in (None, "main", COMMIT):
        model = read_folder(resolve("owner/name", revision))
        assert torch.equal(model.embedding.weight, case("AA").embedding.weight)
    with pytest.raises(UserError, match="cannot be fetched"):
        resolve("owner/name", "another")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c", "owner/"])
def test_what_can_be_no_hub_id_is_a_missing_folder(name, cache):
    with pytest.raises(UserError, match="is not there"):
        resolve(name)


def test_offline_is_said(cache):
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as refusal:
        resolve("owner/unknown")
    assert "owner/unknown is no folder, and cannot be fetched" in str(refusal.value)


def test_without_the_client_the_extra_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"longspan\[hub\]"):
        resolve("owner/name")
