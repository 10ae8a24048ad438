"""Request lengths of the paper's data sets (section 6.1, Figs. 11, 16 and 17), full or compact.

A trace of the authors' artifact takes the first requests of a data set in their order, so it
has means of its own. It can be repeated request by request with the full length files, which
are not shipped. Without them the compact tables of length_tables.py stand in: same
distribution, no order.

    lengths = find_lengths(["lengths.csv.gz"], os.environ.get("LENGTHS_DIR"))
    print(lengths.source("ShareGPT"))
    arrivals, prompts, outputs = lengths.columns("ShareGPT", rate=2.0, duration_s=3600.0, seed=0)

A file is told by the columns that its header names (CSV, plain or gzipped, any order):

    input_len, output_len                       ShareGPT; Alpaca if the file's name says so
    input_len, output_len, input_len_llama      Alpaca
    output_llama_tokens,                        WMT16, prompts of one and of five examples
      suffix_tokens_after_shared_prefix_1shot, suffix_tokens_after_shared_prefix_5shot
    conversation, chunk_suffix, from,           chat: a turn of a conversation a line
      opt_tokens_no_bos
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_sim.reporting.files import short_name
from vllm_sim.workload import length_tables
from vllm_sim.workload.length_tables import WMT16_PROMPTS
from vllm_sim.workload.requests import MAX_LENGTH, Pair, first_pairs, poisson_arrivals
from vllm_sim.workload.text_files import Line, Row, WorkloadError, read_csv, read_text, shown

DATASETS = ("ShareGPT", "Alpaca", "WMT16 1-shot", "WMT16 5-shot", "chat")
WMT16_SHOTS = {"WMT16 1-shot": 1, "WMT16 5-shot": 5}
COMPACT = {  # table, and tokens to add to its inputs
    "ShareGPT": (length_tables.SHAREGPT, 0),
    "Alpaca": (length_tables.ALPACA, 0),
    "WMT16 1-shot": (length_tables.WMT16, WMT16_PROMPTS[1][1]),
    "WMT16 5-shot": (length_tables.WMT16, WMT16_PROMPTS[5][1]),
    "chat": (length_tables.CHAT, 0),
}
COMPACT_SOURCE = "compact table (length_tables.py)"
PAIR_COLUMNS = ("input_len", "output_len")
ALPACA_COLUMNS = (*PAIR_COLUMNS, "input_len_llama")
WMT16_OUTPUT = "output_llama_tokens"
WMT16_SUFFIX = "suffix_tokens_after_shared_prefix_{}shot"
WMT16_COLUMNS = (WMT16_OUTPUT, *(WMT16_SUFFIX.format(shots) for shots in WMT16_SHOTS.values()))
CHAT_COLUMNS = ("conversation", "chunk_suffix", "from", "opt_tokens_no_bos")

MODEL_LEN = 2048  # tokens a request may have in all, and a conversation's history keeps
CHAT_PROMPT = MODEL_LEN // 2  # history and query are cut to their last tokens
CHAT_OUTPUT = MODEL_LEN - CHAT_PROMPT - 8  # the artifact's 8 spare tokens
# The artifact encodes each turn as 'human: text' or 'gpt: text', with a BOS token of its own.
# The file counts the text alone. Three tokens for the speaker are our estimate.
CHAT_TURN = 1 + 3
Lines = list[Line] | None  # of a file, if it was read before


def read_lengths(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) in tokens, int64 (rows,) each, in file order: input_len, output_len."""
    return tuple(read_columns(path, PAIR_COLUMNS))


def read_columns(
    path: str | os.PathLike[str], names: Sequence[str], lines: Lines = None
) -> np.ndarray:
    """The columns `names` of a length file, whole numbers from 1, int64 (columns, rows)."""
    lengths = array("q")  # flat, row by row
    for place, cells in read_cells(path, names, lines):
        lengths.extend([whole_number(place, cell) for cell in cells])
    if not lengths:
        raise WorkloadError(f"{path}: no rows after the header")
    return np.array(lengths, dtype=np.int64).reshape(-1, len(names)).T.copy()


def read_cells(
    path: str | os.PathLike[str], names: Sequence[str], lines: Lines = None
) -> Iterator[Row]:
    """('file, line n', cells of the columns `names`) of each row; the first line names columns."""
    rows = read_csv(lines or read_text(path))
    place, header = next(rows, (os.fspath(path), []))
    if any(header.count(name) != 1 for name in names):
        raise WorkloadError(
            f"{place}: the header must name {', '.join(names)}, once each; it has {shown(header)}"
        )
    wanted = [header.index(name) for name in names]
    for place, cells in rows:
        if len(cells) != len(header):
            raise WorkloadError(f"{place}: {len(cells)} cells, the header has {len(header)}")
        yield place, [cells[index] for index in wanted]


def whole_number(place: str, cell: str, low: int = 1) -> int:
    """The number that a cell spells, from `low` to 10**7; WorkloadError with `place` if not."""
    # Digits only: int() would take '1_0' and '+1', and refuses very long numbers.
    whole = cell.isascii() and cell.isdigit() and len(cell) < 20
    if not whole or not low <= int(cell) <= MAX_LENGTH:
        wanted = f"a whole number from {low} to {MAX_LENGTH}"
        raise WorkloadError(f"{place}: {cell[:30]!a} is not {wanted}")
    return int(cell)


def chat_rounds(path: str | os.PathLike[str], lines: Lines = None) -> list[Pair]:
    """(prompt, output) lengths of every round of the conversations in a file, in file order.

    As in the artifact, the prompt is the end of the history and the query, the output as long
    as the reply; then query and reply, uncut, join the history. It assumes that turns alternate,
    human first. Here a file may cut a long conversation into chunks, of which many repeat the
    last reply of the chunk before. So a human turn is paired with the gpt turn right after it,
    and turns without a partner are left out. By bare position queries and replies would change
    places in such chunks, and outputs come out over a third shorter. A chunk that continues a
    conversation starts with a full history: chunks are cut at about the model's length, and
    joining them gives the same rounds. Raises WorkloadError.
    """
    rounds: list[Pair] = []
    history, query, current = 0, None, None
    for place, cells in read_cells(path, CHAT_COLUMNS, lines):
        conversation, chunk, speaker, text = cells
        skipped, tokens = (whole_number(place, cell, low=0) for cell in (chunk, text))
        tokens += CHAT_TURN
        if conversation != current:
            history, query, current = MODEL_LEN if skipped else 0, None, conversation
        if speaker == "gpt" and query is not None:
            rounds.append((min(history + query, CHAT_PROMPT), min(tokens, CHAT_OUTPUT)))
            history = min(history + query + tokens, MODEL_LEN)
        query = tokens if speaker == "human" else None
    return rounds


def read_pairs(path: str, dataset: str, lines: Lines = None) -> list[Pair]:
    """The (prompt, output) lengths of a data set that a trace may use, in the file's order.

    As in the artifact: ShareGPT's pairs below the model's length, all of Alpaca's, none of which
    is above it, and WMT16's up to it with the shared prefix, whose whole blocks the prompt leaves
    out.
    Raises WorkloadError.
    """
    if dataset == "chat":
        pairs = chat_rounds(path, lines)
    elif dataset in WMT16_SHOTS:
        shots = WMT16_SHOTS[dataset]
        columns = read_columns(path, (WMT16_SUFFIX.format(shots), WMT16_OUTPUT), lines)
        longest = MODEL_LEN - WMT16_PROMPTS[shots][0]
        pairs = [pair for pair in zip(*columns.tolist()) if sum(pair) <= longest]
    else:
        known = zip(*read_columns(path, PAIR_COLUMNS, lines).tolist())
        longest = MODEL_LEN - (dataset == "ShareGPT")
        pairs = [pair for pair in known if sum(pair) <= longest]
    if not pairs:
        raise WorkloadError(f"{path}: no request for {dataset} in it")
    return pairs


@dataclass(frozen=True)
class Lengths:
    """Where the lengths of each data set come from: full files, or the compact tables.

    `files` has the path of each data set that has a file; it is read once, at its first use, unless
    its pairs are `known`.
    Raises ValueError for a data set that is not in DATASETS, WorkloadError for a bad file.
    """

    files: Mapping[str, str]
    known: dict[str, list[Pair]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for dataset in self.files:
            _check_dataset(dataset)
        object.__setattr__(self, "files", dict(self.files))

    def pairs(self, dataset: str) -> list[Pair]:
        """The pairs of a data set that has a file (KeyError for others), see read_pairs."""
        if dataset not in self.known:
            self.known[dataset] = read_pairs(self.files[dataset], dataset)
        return self.known[dataset]

    def source(self, dataset: str) -> str:
        """One line of ASCII for reports: a file's name and size, or which table."""
        _check_dataset(dataset)
        if dataset not in self.files:
            return COMPACT_SOURCE
        name, count = short_name(self.files[dataset]), len(self.pairs(dataset))
        return f"{name} ({count:,} pair{'s' * (count != 1)})"

    def columns(
        self, dataset: str, rate: float, duration_s: float, seed: int, added_prompt_len: int = 0
    ) -> tuple[list[float], list[int], list[int]]:
        """(arrival times in s, prompt lengths, output lengths) of a trace, see make_trace.

        WMT16's prompts leave out the whole blocks of the shared prefix; `added_prompt_len` puts
        them back for a system that shares nothing. For chat, the rounds are the requests: the
        artifact uses all rounds of a trace once, in an order that follows its conversations.
        """
        _check_dataset(dataset)
        if added_prompt_len < 0:
            raise ValueError(f"added_prompt_len must not be negative, not {added_prompt_len!r}")
        arrivals = poisson_arrivals(rate, duration_s, seed).tolist()
        if dataset in self.files:
            pairs = first_pairs(self.pairs(dataset), len(arrivals), seed)
            prompts = [prompt + added_prompt_len for prompt, _ in pairs]
            return arrivals, prompts, [output for _, output in pairs]
        table, rest_of_prefix = COMPACT[dataset]
        inputs, outputs = table.sample(len(arrivals), np.random.default_rng(seed))
        return arrivals, (inputs + (rest_of_prefix + added_prompt_len)).tolist(), outputs.tolist()


def find_lengths(paths: Sequence[str | os.PathLike[str]], directory: str | None) -> Lengths:
    """Lengths from the files `paths`, and from what is recognised in the folder `directory`.

    A file of `paths` goes before those of the folder, and is read here. Raises WorkloadError for
    one that is malformed or not recognised, for a folder that cannot be listed, and where two
    files leave open which of them is meant.
    """
    named: dict[str, str] = {}
    known: dict[str, list[Pair]] = {}
    for path in map(os.fspath, paths):
        lines = [*read_text(path)]  # once, as it may be a pipe
        datasets = _datasets(path, header := _header(lines))
        if not datasets:
            raise WorkloadError(
                f"{path}: no data set is known by the columns {shown(header)}; input_len and "
                "output_len would do (others: vllm_sim/workload/data_sets.py)"
            )
        _claim(named, path, datasets)
        known |= {dataset: read_pairs(path, dataset, lines) for dataset in datasets}
    found: dict[str, str] = {}
    for path in _files_in(directory) if directory else ():
        try:
            header = _header(read_text(path))
        except WorkloadError:
            continue  # a folder may hold anything
        _claim(found, path, [name for name in _datasets(path, header) if name not in named])
    return Lengths(found | named, known)


def _check_dataset(name: str) -> None:
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")


def _files_in(directory: str) -> list[str]:
    try:
        paths = [os.path.join(directory, name) for name in sorted(os.listdir(directory))]
    except OSError as error:
        raise WorkloadError(f"{directory}: cannot be listed: {error.strerror}") from None
    return [path for path in paths if os.path.isfile(path)]  # a pipe would never end


def _header(lines: Iterable[Line]) -> list[str]:
    return next(read_csv(lines), ("", []))[1]


def _datasets(path: str, header: Sequence[str]) -> Sequence[str]:
    """The data sets that a file is for, none if it is not recognised."""
    if set(CHAT_COLUMNS) <= set(header):
        return ("chat",)
    if set(WMT16_COLUMNS) <= set(header):
        return tuple(WMT16_SHOTS)
    if set(ALPACA_COLUMNS) <= set(header):
        return ("Alpaca",)
    if not set(PAIR_COLUMNS) <= set(header):
        return ()
    said = [name for name in ("ShareGPT", "Alpaca") if name.lower() in _name(path).lower()]
    if len(said) > 1:
        raise WorkloadError(f"{path}: ShareGPT or Alpaca? Its header fits both, its name has both")
    return said or ("ShareGPT",)


def _claim(files: dict[str, str], path: str, datasets: Sequence[str]) -> None:
    for dataset in datasets:
        if dataset in files:
            other = _name(files[dataset])
            raise WorkloadError(f"{path}: {other} could be {dataset} as well, name one of them")
        files[dataset] = path


def _name(path: str) -> str:
    return os.path.basename(path)
