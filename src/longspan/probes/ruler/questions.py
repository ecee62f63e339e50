"""The questions of `qa_1` and `qa_2` in the forms that their data sets are published in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.corpus.sources.compressed import read_chunks
from longspan.foundation.errors import DataError, UserError
from longspan.probes.benchmark_files import read_rows
from longspan.probes.ruler.tasks import Question, read_questions

ALLOWED = "SQuAD (dev-v2.0.json), HotpotQA (distractor) or rows {question, answers, documents}"


def questions_of(path: Path) -> list[Question]:
    """Questions with the documents that hold their answers.

    Raises:
        UserError: no such file.
        DataError: none of the forms in `ALLOWED`.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not there", ALLOWED, "check the path")
    if ".jsonl" in path.name:
        return _checked(path, _rows(read_rows(path, (), "questions")))
    try:
        content = json.loads(b"".join(read_chunks(path)))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error})", ALLOWED, "get the file again") from None
    if isinstance(content, dict) and "data" in content:
        return _checked(path, _squad(content["data"]))
    return _checked(path, _rows(content) if isinstance(content, list) else [])


def _checked(path: Path, found: list[Question]) -> list[Question]:
    if not found:
        raise DataError(f"{path} holds no questions", ALLOWED, "name the right file")
    return found


def _squad(articles: Any) -> list[Question]:
    return [
        Question(question["question"], tuple(dict.fromkeys(each["text"] for each in question["answers"])), (text,))
        for article in articles
        for paragraph in article["paragraphs"]
        for text in [paragraph["context"]]
        for question in paragraph["qas"]
        if question["answers"]
    ]


def _rows(rows: Any) -> list[Question]:
    if rows and "documents" in rows[0]:
        return read_questions(rows)
    return [_hotpot(row) for row in rows if "context" in row and "answer" in row and "question" in row]


def _hotpot(row: Mapping[str, Any]) -> Question:
    documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
    return Question(row["question"], (row["answer"],), documents)
