"""Read what `dataset_path` names into documents, and say in a few lines what that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moe_shard.config.keys import shown
from moe_shard.config.schema import DataConfig
from moe_shard.data.conversations import ConversationColumns
from moe_shard.data.corpus import Say
from moe_shard.data.decoded import CorruptRecord, FileCounts, decode, text_cache
from moe_shard.data.documents import FoundFile, find_files
from moe_shard.data.fields import Columns, Problem, TextColumn
from moe_shard.data.long_work import LongWork
from moe_shard.data.remote_files import fetched, is_remote
from moe_shard.data.spans import Documents, FilePart
from moe_shard.errors import UserError

_MOST_LISTED = 4
_MARK_BYTES = 3
_LARGE_BYTES = 100_000_000


class FoundText(NamedTuple):
    """Hold the documents of a corpus.

    Attributes:
        documents: the documents.
        lines: what was read and what was not, for people.
    """

    documents: Documents
    lines: tuple[str, ...]


def find_text(
    config: DataConfig,
    paths: Sequence[str],
    *,
    key: str = "dataset_path",
    columns: Sequence[str] | None = None,
    split: str | None = None,
    say: Say = lambda _: None,
) -> FoundText:
    """Find the documents that some paths name.

    Args:
        config: how they are read.
        paths: see `find_files`.
        key: key that names the paths, for messages.
        columns: fields that hold the text; None: `train_data_columns`.
        split: split of a folder; None: `train_split`.
        say: receives a line if much has to be read first.

    Raises:
        UserError: a path has no text, or a record is corrupt and `corrupt_records` is "stop".
    """
    chosen = config.train_data_columns if columns is None else columns
    column_key = "train_data_columns" if key == "dataset_path" else "eval_data_columns"
    local = [fetched(path, say) if is_remote(path) else path for path in paths]
    found = find_files(local, split=config.train_split if split is None else split)
    passed = dict(found.passed_over)
    parts: list[tuple[FoundFile, FilePart]] = []
    counts: dict[Path, FileCounts] = {}
    to_decode = [each for each in found.files if not _is_read_as_it_is(each, config)]
    size = sum(each.path.stat().st_size for each in to_decode)
    if size >= _LARGE_BYTES:
        say(f"text: reading {size / 1e6:,.0f} MB once, into {text_cache()}, unless it is there")
    work = _Reading(say, len(to_decode))
    for each in found.files:
        if config.use_sft and each.form.kind == "text":
            passed[each.path] = _no_conversations(each)
            continue
        if _is_read_as_it_is(each, config):
            skip = _MARK_BYTES if each.form.encoding else 0
            parts.append((each, FilePart.whole_file(each.path, skip=skip)))
            continue
        taken = _columns(config, chosen, each.path)
        reader = _Reader(each, taken, column_key, config)
        reason = reader.read(work.watch)
        work.files += 1
        if reason:
            passed[each.path] = reason
        else:
            work.text += reader.part.size
            parts.append((each, reader.part))
            counts[each.path] = reader.counts
    work.end()
    if not parts:
        first, reason = next(iter(passed.items()))
        raise UserError(
            f"{key}: {shown(list(paths))} holds no text: {first} {reason}\n"
            "fix: a file, folder or glob with at least one document"
        )
    documents = Documents.of_parts([part for _, part in parts])
    noun = "conversations" if config.use_sft else "documents"
    lines = _lines(documents, parts, counts, passed, paths, noun=noun)
    return FoundText(documents, lines)


def _is_read_as_it_is(found: FoundFile, config: DataConfig) -> bool:
    """Return whether the file itself is the document, without a copy."""
    return found.form.plain and (found.form.valid or not config.dataset_encoding)


def _columns(config: DataConfig, names: Sequence[str], path: Path) -> Columns:
    """Say what is taken from the records of a file."""
    return ConversationColumns(names, str(path)) if config.use_sft else TextColumn(names[0])


def _no_conversations(found: FoundFile) -> str:
    """Say why a file of text is passed over where conversations are read.

    Raises:
        UserError: it is named by itself.
    """
    reason = "is text, and conversations are read from records (use_sft=true)"
    if found.named:
        raise UserError(
            f"{found.path} {reason}\nfix: JSON Lines or Parquet with a field messages, or prompt "
            "and completion"
        )
    return reason


class _Reading:
    """Say how much is read, if that takes long.

    Attributes:
        files: files that are read by now.
        text: bytes of text in them.
    """

    def __init__(self, say: Say, count: int) -> None:
        self._say, self._work, self._count = say, LongWork(say), count
        self.files = self.text = 0

    def watch(self, written: int) -> None:
        """Say it, with what is read of the file being read."""
        self._work.tell(
            lambda: (
                f"text: {(self.text + written) / 1e6:,.0f} MB of text read so far, "
                f"{self.files:,} of {self._count:,} files done"
            )
        )

    def end(self) -> None:
        """Say what it took, if it was long."""
        if self._work.long:
            self._say(f"text: {self.text / 1e6:,.0f} MB of text read in {self._work.seconds:.0f} s")


class _Reader:
    """Decode one file, and turn what is wrong with it into a reason or an error."""

    def __init__(self, found: FoundFile, columns: Columns, key: str, config: DataConfig) -> None:
        self._found, self._columns, self._key, self._config = found, columns, key, config
        self.part: FilePart
        self.counts: FileCounts

    def read(self, watch: Callable[[int], object]) -> str:
        """Read the file; return why it is passed over, or nothing.

        Args:
            watch: see `decode`.

        Raises:
            UserError: a record is corrupt, and `corrupt_records` is "stop"; or no record of a
                file of records has the field.
        """
        found, path = self._found, self._found.path
        try:
            decoded = decode(
                path,
                found.form,
                columns=self._columns,
                encoding=self._config.dataset_encoding,
                skip=self._config.corrupt_records == "skip",
                watch=watch,
            )
        except CorruptRecord as stopped:
            problem = stopped.problem
            if found.form.kind == "json" and not found.named and not stopped.before:
                return f"is JSON of another form: {problem.where}: {problem.what}"
            if problem.fields:
                raise self._lacks(problem) from stopped
            raise UserError(
                f"{path}, {problem.where}: {problem.what}\n"
                "fix: mend it, or corrupt_records=skip to count such records and pass over them"
            ) from stopped
        self.counts = decoded.counts
        if not len(decoded.ends):
            if decoded.counts.lacking and (found.named or found.form.kind != "json"):
                raise self._lacks(
                    Problem("every record", f"no field {self._columns.words}"),
                    decoded.counts.fields,
                )
            named = f": {decoded.counts.named[0]}" if decoded.counts.named else ""
            return f"holds no document{named}"
        self.part = FilePart.of_copy(decoded.path, decoded.ends, key=decoded.key, origin=path)
        return ""

    def _lacks(self, problem: Problem, fields: Sequence[str] = ()) -> UserError:
        fields = problem.fields or fields
        names = ", ".join(map(shown, fields)) or "none"
        likely = next((n for n in fields if n in ("content", "body", "document", "passage")), "")
        if self._config.use_sft:
            return UserError(
                f"{self._found.path}, {problem.where}: {problem.what}; its fields: {names}\n"
                f"fix: {self._key}=[FIELD] with messages, or [PROMPT, COMPLETION]"
            )
        return UserError(
            f"{self._found.path}, {problem.where}: {problem.what}; its fields: {names}\n"
            f"fix: {self._key}=[{likely or 'FIELD'}], the field that holds the text"
        )


def _lines(
    documents: Documents,
    parts: Sequence[tuple[FoundFile, FilePart]],
    counts: dict[Path, FileCounts],
    passed: dict[Path, str],
    paths: Sequence[str],
    *,
    noun: str,
) -> tuple[str, ...]:
    """Say what is read, and what is not."""
    kinds = Counter(str(each.form) for each, _ in parts)
    of = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    where = ", ".join(paths) if paths else "the source text of Python's standard library"
    lines = [
        f"text: {len(documents):,} {noun} in {len(parts):,} files ({of}), "
        f"{documents.num_bytes / 1e6:,.2f} MB: {where}"
    ]
    if passed:
        lines.append(f"text: passed over: {_listed([f'{p} {why}' for p, why in passed.items()])}")
    encodings = [f"{each.path} ({each.form.encoding})" for each, _ in parts if each.form.encoding]
    if encodings:
        lines.append(f"text: by their byte-order marks: {_listed(encodings)}")
    other = [str(each.path) for each, _ in parts if not each.form.valid]
    plain = [str(e.path) for e, part in parts if not e.form.valid and part.whole]
    if plain:
        lines.append(
            f"text: not UTF-8, read as bytes or U+FFFD: {_listed(plain)}; "
            "dataset_encoding=latin-1, for example, decodes them"
        )
    elif other:
        lines.append(f"text: not UTF-8, read by dataset_encoding: {_listed(other)}")
    without = sum(each.without_text for each in counts.values())
    if without:
        lines.append(f"text: {without:,} records without text (empty or null) left out")
    corrupt = {path: each for path, each in counts.items() if each.corrupt}
    if corrupt:
        total = sum(each.corrupt for each in corrupt.values())
        named = [f"{path}, {what}" for path, each in corrupt.items() for what in each.named]
        lines.append(f"text: {total:,} corrupt records passed over: {_listed(named, total)}")
    return tuple(lines)


def _listed(items: Sequence[str], total: int | None = None) -> str:
    """Name the first of some items, and how many more there are."""
    total = len(items) if total is None else total
    shown_items = list(items[:_MOST_LISTED])
    more = total - len(shown_items)
    return "; ".join(shown_items) + (f"; and {more:,} more" if more > 0 else "")
