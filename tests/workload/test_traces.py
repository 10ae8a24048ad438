"""Request traces from files: every format, every reason to refuse a row or a file."""

import gzip
import json
import os

import numpy as np
import pytest
from test_data_sets import DATA, needs_data

from vllm_sim.workload import text_files
from vllm_sim.workload.text_files import WorkloadError
from vllm_sim.workload.trace_formats import COLUMNS, FAILED
from vllm_sim.workload.traces import Trace, prefix_hits, read_trace, why

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55\r\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,230,1317,Conversation log\n"
    "118,GPT-4,417,0,417,API log\n"
    "120,GPT-4,417,276,693,API log\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 1455, "output_length": 52, "hash_ids": [46, 47, 2353]}\n'
    '{"timestamp": 30535, "input_length": 1472, "output_length": 26, "hash_ids": [46, 47, 2366]}\n'
    '{"timestamp": 30536, "input_length": 600, "output_length": 7, "hash_ids": [9, 47]}\n'
)


@pytest.fixture
def read(tmp_path):
    """Reads text as a file of a name that says nothing."""

    def read(text, at_most=None, **more):
        path = tmp_path / "x"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_trace(path, at_most, **more)

    return read


def columns(trace):
    times = None if trace.arrivals is None else trace.arrivals.tolist()
    return times, trace.prompts.tolist(), trace.outputs.tolist()


def reasons(trace):
    return {reason: found.rows for reason, found in trace.refused.items()}


# ---- formats ----------------------------------------------------------------------------------


LATER = "\n".join(row.replace(",", ",7,", 1) for row in BURSTGPT.splitlines())
BURST = ([0.0, 40.0, 115.0], [472, 1087, 417], [18, 230, 276])
AT = [0.0, 4.314579, 4.541877]


@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
@pytest.mark.parametrize(
    ("text", "form", "there", "failed", "hashes"),
    [
        (AZURE, "Azure CSV", (AT, [374, 396, 879], [44, 109, 55]), {}, (0, 0)),
        (BURSTGPT, "BurstGPT CSV", BURST, {FAILED: 1}, (0, 0)),
        (LATER, "BurstGPT CSV", BURST, {FAILED: 1}, (0, 0)),  # as its later releases: more columns
        # 46 and 47 lead the second prompt; the third's 47 comes behind a block that is new.
        (
            MOONCAKE,
            "Mooncake JSON lines",
            ([0.0, 3.053, 3.054], [1455, 1472, 600], [52, 26, 7]),
            {},
            (2, 8),
        ),
    ],
)
def test_published_formats(read, pack, text, form, there, failed, hashes):
    trace = read(pack(text))
    times, *lengths = columns(trace)
    assert times == pytest.approx(there[0], abs=1e-6) and tuple(lengths) == there[1:]
    assert (trace.form, trace.rows_read) == (form, 3 + len(failed)) and trace.span_s == times[-1]
    assert reasons(trace) == failed and (trace.hash_hits, trace.hash_blocks) == hashes
    assert {refusal.first_line for refusal in trace.refused.values()} == {4} & {4 * len(failed)}


def test_mooncake_without_blocks_and_other_json_lines(read):
    trace = read('{"timestamp": 1000, "input_length": 5, "output_length": 2}\n')
    assert trace.form == "Mooncake JSON lines" and trace.hash_blocks == 0
    text = '{"arrived_at": %s, "num_prefill_tokens": 5.0, "num_decode_tokens": 2}\n'
    trace = read("".join(text % at for at in (1, 2.5, '"4"')))
    assert trace.form == "JSON lines" and trace.arrivals.tolist() == [0.0, 1.5, 3.0]
    trace = read('{"prompt_len": 5, "output_len": 2, "timestamp_ms": 5}\n' * 2)
    assert trace.arrivals.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prompt", " ".join(COLUMNS["prompt"]).split())
@pytest.mark.parametrize("output", " ".join(COLUMNS["output"]).split()[::4])
def test_named_columns_in_any_order_and_spelling(read, prompt, output):
    trace = read(f"Row,{output.upper()},time_ms,{prompt}\na,2,500,10\nb,3,2500,20\n")
    assert columns(trace) == ([0.0, 2.0], [10, 20], [2, 3]) and trace.form == "plain CSV"


@pytest.mark.parametrize("name", " ".join(COLUMNS["time"]).split())
def test_names_of_the_time(read, name):
    assert read(f"input_len,output_len,{name}\n1,1,3\n1,1,7.25\n").arrivals.tolist() == [0.0, 4.25]


@pytest.mark.parametrize("name", ["Prompt Tokens", "prompt_tokens", "promptTokens", '"PROMPT-len"'])
def test_spelling_of_names(read, name):
    assert columns(read(f"{name},output_len\n3,4\n")) == (None, [3], [4])


def test_quotes_marks_and_blank_lines(read):
    text = '\ufeff"Prompt tokens", output_len ,note\n\n"3",4,"a, b"\n  \n5, 6.0,c\n'
    assert columns(read(text)) == (None, [3, 5], [4, 6])


def test_a_cell_in_quotes_may_hold_commas_and_line_breaks(read):
    """Of a prompt's text, say, whose second line could be taken for a row of its own."""
    text = 'text,input_len,output_len\n"a\n5,6,7",3,4\n"b ""c"", d\n\ne\n",5,6\nf "g",8,9\nh,x,1\n'
    trace = read(text)
    assert columns(trace) == (None, [3, 5, 8], [4, 6, 9]) and trace.lines.tolist() == [2, 4, 8]
    assert {why: found.first_line for why, found in trace.refused.items()} == {
        "the prompt is not a number of tokens": 9
    }
    assert columns(read('input_len,"the\noutput len",output_len\n1,2,3\n')) == (None, [1], [3])


DATES = "TIMESTAMP,ContextTokens,GeneratedTokens\n{},374,44\n{},396,109\n"
OBJECT = '{"usage": {"prompt_tokens": 374, "completion_tokens": 44}, "arrival_time": 5, "x": 1, '
OBJECT += '"start_time": 9, "prompt": "a b"}'
OBJECTS = OBJECT + "\n" + OBJECT.replace("374", "396").replace("44", "109").replace(": 5", ": 9")
PLAIN, SEMICOLONS = DATES.format(1, 5), DATES.replace(",", ";")


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (SEMICOLONS.format("0,5", "4,5"), "times in seconds"),
        (PLAIN.replace(",", "\t"), "times in seconds"),
        ("sep=|\r\n" + PLAIN.replace(",", "|"), "times in seconds"),
        (PLAIN.encode("utf-16"), "times in seconds"),
        (PLAIN.encode("utf-16-le"), "times in seconds"),
        (PLAIN.replace("\n", ",M\xe9\n").encode("latin-1"), "times in seconds"),
        (PLAIN.replace("374", '"0 374"'), "times in seconds"),
        (PLAIN.replace("374", "0\xa0374").encode("latin-1"), "times in seconds"),
        (DATES.format("1700158546680000", "1700158550680000"), "times in microseconds since 1970"),
        (DATES.format("1700158546680", "1700158550680"), "times in milliseconds since 1970"),
        (
            PLAIN.replace("TIMESTAMP", "time (ns)").replace("5,", "4000000001,"),
            "as 'time (ns)' say",
        ),
        (DATES.format("1/6/2023 11:59:58 AM", "1/6/2023 12:00:02 PM"), "dates as %m/%d/%Y %I:%M:"),
        (DATES.format("31/12/2023 23:59:58", "1/1/2024 0:00:02"), "dates as %d/%m/%Y %H:%M:%S: 2"),
        (DATES.format("2024-05-10 00:00:00+00:00", "2024-05-10 02:00:04.0+02:00"), "dates: 2"),
        (SEMICOLONS.format("5.12.23 18:15:46,5", "5.12.23 18:15:50,5"), "as %d.%m.%y"),
        (DATES.format("2023/12/05 18:15:00", "2023/12/05 18:15:04"), "as %Y/%m/%d %H:%M:%S"),
        (DATES.format("23:59:58", "00:00:02"), "times of day"),
        ("ts,input_tokens,total_tokens\n1,374,418\n5,396,505\n", "times in seconds"),
        (OBJECTS, "times in seconds"),
        (f" [{OBJECTS}]".replace("\n", ",\n"), "times in seconds"),
        (f"[{OBJECTS}]".replace("\n", ",").encode("utf-16"), "times in seconds"),
    ],
)
def test_traces_as_people_have_them(read, text, times):
    """Excel's separators and encodings, other names, JSON arrays, and times in any form."""
    trace = read(text)
    assert columns(trace)[1:] == ([374, 396], [44, 109]) and times in trace.times
    assert trace.arrivals.tolist() == pytest.approx([0.0, 4.0], abs=1e-6)
    assert trace.times.endswith(": 2 requests over 4.000 s, 0.25 requests a second")


@pytest.mark.parametrize(("second", "span"), [("08:30:00", 55_800), ("16:59:00", 60)])
def test_a_night_lies_between_two_days_but_a_late_row_is_of_the_same(read, second, span):
    assert read(DATES.format("17:00:00", second)).span_s == span


def test_a_long_array_on_one_line_and_one_that_breaks_off(read):
    text = "[" + ", ".join([OBJECT] * 3000)
    assert len(text) > 5 * text_files.MAX_LINE_BYTES
    assert len(read(text + "]")) == len(read(text)) == 3000 and len(read(text, 7)) == 7
    trace = read(f"[{OBJECT},\n{OBJECT},\n{{nothing}}, {OBJECT}]")
    assert len(trace) == 2 and trace.refused["not a JSON object"].first_line == 3
    with pytest.raises(WorkloadError, match="line 1: the line is too long"):
        read("[" + OBJECT.replace("a b", "a" * 70_000) + "]")


def mooncake(block, scale, ids=True):
    lengths = np.random.default_rng(2).integers(1, 5000, 20).tolist()
    row = '{{"timestamp": {}, "input_length": {}, "output_length": 5, "hash_ids": {}}}\n'.format
    blocks = [[*range(-(-length // block))] * ids for length in lengths]
    return "".join(row(i * 37 * scale, *both) for i, both in enumerate(zip(lengths, blocks)))


@pytest.mark.parametrize(
    ("text", "unit", "span", "says"),
    [
        (mooncake(512, 1), None, 0.703, "times in milliseconds, as blocks of 512 tokens say: 20"),
        (mooncake(16, 0.1), None, 70.3, "times in seconds, as they have fractions: 20 requests"),
        (mooncake(16, 1), None, 703.0, "times in seconds, as blocks of 16 tokens say"),
        (mooncake(64, 0.1), None, 70.3, "times in seconds, as they have fractions"),
        (
            mooncake(64, 1),
            None,
            None,
            "They are whole, with blocks of 64 tokens; Mooncake's are mil",
        ),
        (mooncake(64, 1, False), None, None, "They are whole, with no hash_ids that fit the lengt"),
        (mooncake(512, 0.1), None, None, "They are not whole, with blocks of 512 tokens; Mooncake"),
        (mooncake(64, 1), "ms", 0.703, "times in milliseconds, as --time-unit says"),
    ],
)
def test_the_unit_of_mooncakes_keys_is_found_or_asked_for(read, text, unit, span, says):
    if span is not None:
        trace = read(text, unit=unit)
        assert says in trace.times and trace.span_s == pytest.approx(span)
        return
    with pytest.raises(WorkloadError) as caught:
        read(text, unit=unit)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_the_format_is_not_told_by_the_name(tmp_path):
    for name in ("trace.jsonl", "mooncake.csv.gz", "azure"):
        path = tmp_path / name
        path.write_text(BURSTGPT)
        assert read_trace(path).form == "BurstGPT CSV"
        path.write_text(MOONCAKE)
        assert read_trace(str(path)).form == "Mooncake JSON lines"


# ---- rows that are refused --------------------------------------------------------------------

WRONG_ROWS = [
    ("x,5,5", "the time is not one"),
    ("nan,5,5", "the time is not one"),
    ("inf,5,5", "the time is not one"),
    (",5,5", "the time is not one"),
    ("1_0,5,5", "the time is not one"),
    ("2023-13-01 00:00:00,5,5", "the time is not one"),
    ("1700000000000,5,5", "a time after the year 5000: in another unit? (--time-unit)"),
    ("2023-11-16 18:15:46,5,5", "the time is of another kind than in the rows above"),
    ("1,x,5", "the prompt is not a number of tokens"),
    ("1,5.5,5", "the prompt is not a number of tokens"),
    ("1,1e3,5", "the prompt is not a number of tokens"),
    ("1,1.000,5", "the prompt is not a number of tokens"),
    ("1,,5", "the prompt is not a number of tokens"),
    ("1,5,nan", "the output is not a number of tokens"),
    ("1,5," + "9" * 30, "the output is not a number of tokens"),
    ("1,5,\u0663", "the output is not a number of tokens"),
    ("1,-5,5", "negative tokens"),
    ("1,5,-1", "negative tokens"),
    ("1,0,5", "a prompt of 0 tokens"),
    ("1,5,0", "an output of 0 tokens"),
    ("1,0,0", "an output of 0 tokens"),
    ("1,10000001,5", "more than 10,000,000 tokens"),
    ("1,5", "more or fewer cells than the header"),
    ("1,5,5,5", "more or fewer cells than the header"),
    ("1,5\0,5", "the prompt is not a number of tokens"),
    ("1,5\r6,5", "the prompt is not a number of tokens"),
    ('1,"5"\r6,5', "more or fewer cells than the header"),
]


@pytest.mark.parametrize(("row", "reason"), WRONG_ROWS)
def test_a_row_that_cannot_be_served_is_refused_alone(read, row, reason):
    trace = read(f"time,input_len,output_len\n0,7,8\n{row}\n{row}\n3,9,10\n")
    assert columns(trace) == ([0.0, 3.0], [7, 9], [8, 10])
    assert reasons(trace) == {reason: 2} and trace.refused[reason].first_line == 3
    assert trace.rows_read == 4
    if reason.startswith("a time after") is ("another kind" in reason):  # alone they are sound
        with pytest.raises(WorkloadError) as caught:
            read(f"time,input_len,output_len\n{row}\n")
        assert str(caught.value).endswith(f"no request can be served: 1 {reason} (first in line 2)")


NO_OBJECT, NO_TOKENS, NO_TIME = (
    "not a JSON object",
    "is not a number of tokens",
    "the time is not one",
)
WHOLE_ROW = '{"timestamp": 1, "input_length": 500, "output_length": 5, "hash_ids": '
NO_HASHES = "hash_ids are not whole numbers"
WRONG_JSON = [
    ("[1, 2]", NO_OBJECT),
    ('{"timestamp": 1', NO_OBJECT),
    ("[" * 60_000, NO_OBJECT),
    ('{"timestamp": 1, "input_length": %s}' % ("9" * 6000), NO_OBJECT),
    ('{"timestamp": 1, "input_length": 5}', f"the output {NO_TOKENS}"),
    ('{"timestamp": 1, "input_length": true, "output_length": 5}', f"the prompt {NO_TOKENS}"),
    ('{"timestamp": 1, "input_length": NaN, "output_length": 5}', f"the prompt {NO_TOKENS}"),
    ('{"timestamp": 1, "input_length": [], "output_length": 5}', f"the prompt {NO_TOKENS}"),
    ('{"timestamp": null, "input_length": 5, "output_length": 5}', NO_TIME),
    ('{"timestamp": true, "input_length": 5, "output_length": 5}', NO_TIME),
    ('{"timestamp": Infinity, "input_length": 5, "output_length": 5}', NO_TIME),
    ('{"timestamp": %s, "input_length": 5, "output_length": 5}' % ("9" * 400), NO_TIME),
    ('{"input_length": 5, "output_length": 5}', NO_TIME),
    (f"{WHOLE_ROW}7}}", NO_HASHES),
    (f"{WHOLE_ROW}[1.5]}}", NO_HASHES),
    (f"{WHOLE_ROW}[true]}}", NO_HASHES),
]


@pytest.mark.parametrize(("row", "reason"), WRONG_JSON)
def test_a_json_row_that_cannot_be_served_is_refused_alone(read, row, reason):
    trace = read(MOONCAKE + row + "\n")
    assert len(trace) == 3 and reasons(trace) == {reason: 1}
    assert trace.refused[reason].first_line == 4


def test_longer_than_the_model_is_refused_with_the_line(read):
    trace = read("input_len,output_len\n10,10\n15,6\nx,1\n15,5\n").up_to(20)
    assert columns(trace)[1:] == ([10, 15], [10, 5]) and trace.rows_read == 4
    assert reasons(trace) == {"the prompt is not a number of tokens": 1, "longer than 20 tokens": 1}
    assert trace.refused["longer than 20 tokens"].first_line == 3
    assert trace.up_to(20) is trace
    with pytest.raises(WorkloadError, match="no request can be served: 2 longer than 5 tokens"):
        read("input_len,output_len\n10,10\n15,6\n").up_to(5)


def test_reasons_are_told_the_commonest_first(read):
    trace = read("input_len,output_len\n1,1\n1,0\n1,0\nx,1\n")
    assert why(trace.refused) == (
        "2 an output of 0 tokens (first in line 3); "
        "1 the prompt is not a number of tokens (first in line 5)"
    )


def test_times_that_go_backwards_are_sorted_and_counted(read):
    trace = read("time,input_len,output_len\n5,1,1\n3,2,2\n9,3,3\n3,4,4\n")
    assert columns(trace) == ([0.0, 0.0, 2.0, 6.0], [2, 4, 1, 3], [2, 4, 1, 3])
    assert trace.rows_sorted == 2
    assert trace.up_to(7).lines.tolist() == [3, 2, 4]


def test_blocks_are_counted_in_order_of_arrival(read):
    one = '{"timestamp": 9, "input_length": 9, "output_length": 1, "hash_ids": [1, 2, 3]}\n'
    two = '{"timestamp": 5.5, "input_length": 8, "output_length": 1, "hash_ids": [1, 7]}\n'
    trace = read(one + two)
    assert (trace.hash_hits, trace.hash_blocks) == (1, 5)  # 1, when the second line was first
    assert trace.up_to(10).hash_hits == 1


def test_only_the_first_rows(read):
    trace = read(AZURE, 2)
    assert (trace.rows_read, len(trace)) == (2, 2)
    trace = read("input_len,output_len\n0,1\n2,2\n3,3\n", 2)
    assert (trace.rows_read, len(trace)) == (2, 1)


# ---- files that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        (AZURE.split("\r")[0], "no rows after the header"),
        ("a,b,c\n1,2,3\n", "its columns, separated by ',': 'a', 'b', 'c'; wanted is one"),
        (
            "input_len;b\n1;2\n",
            "separated by ';': 'input_len', 'b'; wanted is one for the output: ",
        ),
        ("a\tb\n1\t2\n", "'\\t': 'a', 'b'; wanted is one for the prompt: prompt_tokens, input_"),
        ("1,2,3\n", "no trace of a known format"),
        ("[1, 2]\n", "no trace of a known format"),
        ('{"a": 1}\n', "its keys: 'a'; wanted is one for the prompt: prompt_tokens, "),
        ('{"a": 1\n', "no trace of a known format: not a JSON object"),
        (
            "input_len,prompt_len,output_len\n1,2,3\n",
            "'input_len' and 'prompt_len' could both be the prompt: keep one column",
        ),
        ("input_len,input_len,output_len\n1,2,3\n", "could both be the prompt"),
        ("input_len,output_len,time,time_ms\n1,2,3,4\n", "could both be the time: keep one column"),
        ("input_len,output_len,time\n1,2,0\n1,2,1e9\n", "more than ten years"),
        ("input_len,output_len\n1,0\n", "no request can be served: 1 an output of 0 tokens"),
        (b"\x1f\x8b\x08", "cannot be read: "),
        (gzip.compress(AZURE.encode(), mtime=0)[:-9], "cannot be read: "),
        (b"\xff\xfe\0\0", "no trace of a known format"),
        ("x" * 70_000, "line 1: the line is too long"),
        ('input_len,output_len\n1,2\n"3,4\n5,6\n', "line 3: a cell in quotes does not end"),
        ('input_len,output_len\n"3,4\n' + "5,6\n" * 50_000, "line 2: a cell in quotes does not"),
        ("a,b,c\n1,2,3\n", " ... (capitals, blanks, _ and - do not matter)"),
    ],
)
def test_a_file_that_cannot_be_used(read, tmp_path, text, told):
    with pytest.raises(WorkloadError) as caught:
        read(text)
    line = str(caught.value)
    assert told in line and "\n" not in line and line.startswith(str(tmp_path / "x"))
    assert len(line) < 500


def test_files_that_are_not_there_or_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none.csv", ".", "pipe"):
        with pytest.raises(WorkloadError, match="cannot be read"):
            read_trace(tmp_path / name)


def test_a_gzip_bomb_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_FILE_BYTES", 10**6)
    path = tmp_path / "x"
    row = b'{"timestamp": 1, "input_length": 5, "output_length": 5}\n'
    monkeypatch.setattr(text_files, "MAX_PACKED_BYTES", 10**5)
    noise = b"".join(b'{"x": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(999))
    for content in (row * 20_000, gzip.compress(row * 20_000), gzip.compress(row * 2000 + noise)):
        path.write_bytes(content)
        with pytest.raises(WorkloadError, match="too long: read its first rows with --trace-rows"):
            read_trace(path)
        assert len(read_trace(path, 1000)) == 1000  # not read any further
    with pytest.raises(WorkloadError, match="too long"):
        read_trace(path, 2999)


# ---- arrivals and prefixes --------------------------------------------------------------------


def plain(count):
    tokens = np.arange(1, count + 1)
    return Trace("t", "plain CSV", count, tokens, tokens)


def test_arrivals_at_a_rate():
    trace = plain(40_000).arriving(5.0, 0)
    gaps = np.diff(trace.arrivals)
    assert trace.arrivals[0] == 0.0 and gaps.min() > 0.0
    assert gaps.mean() == pytest.approx(0.2, rel=0.03) == gaps.std()
    assert (trace.arrivals == plain(40_000).arriving(5.0, 0).arrivals).all()
    assert (trace.arrivals != plain(40_000).arriving(5.0, 1).arrivals)[1:].all()
    assert plain(9).arriving(float("inf"), 0).arrivals.tolist() == [0.0] * 9


def test_prefix_hits_by_hand_and_by_brute_force():
    assert prefix_hits([]) == prefix_hits([()]) == (0, 0)
    assert prefix_hits([(1, 2), (1, 2), (1, 3, 2), (3,)]) == (2 + 1 + 1, 8)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 6, rng.integers(0, 5)).tolist()) for _ in range(300)]
    hits = 0
    for i, ids in enumerate(prompts):
        before = {one for earlier in prompts[:i] for one in earlier}
        hits += next((n for n, one in enumerate(ids) if one not in before), len(ids))
    assert prefix_hits(prompts) == (hits, sum(map(len, prompts)))


# ---- the public traces, where they are --------------------------------------------------------


@needs_data
def test_the_azure_conversations_of_2023():
    trace = read_trace(DATA / "AzureLLMInferenceTrace_conv.csv.gz")
    assert (trace.form, trace.refused) == ("Azure CSV", {})
    assert len(trace) == trace.rows_read == 19_366
    assert int(trace.outputs.sum()) == 4_088_665 and trace.rows_sorted == 0
    assert trace.prompts.mean() == pytest.approx(1154.7, abs=0.05)
    assert trace.span_s == pytest.approx(3501.72, abs=0.01)


@needs_data
def test_mooncakes_bound_on_the_reuse_of_prefixes():
    trace = read_trace(DATA / "mooncake_fast25_synthetic_trace.jsonl.gz")
    assert len(trace) == trace.rows_read == 3993
    assert round(100 * trace.hash_hits / trace.hash_blocks, 1) == 64.0
    assert trace.hash_block == 512 and trace.span_s == pytest.approx(1022.025)
    assert trace.hash_blocks == (-(-trace.prompts // 512)).sum()


@needs_data
def test_length_files_are_traces_without_times():
    trace = read_trace(DATA / "sharegpt_sosp23_opt_lengths.csv.gz", 1000)
    assert trace.arrivals is None and len(trace) == 1000


def test_json_rows_agree_with_the_same_rows_in_csv(read):
    rng = np.random.default_rng(1)
    rows = [(i / 4, *map(int, rng.integers(1, 999, 2))) for i in range(200)]
    names = ("arrival_s", "prompt_tokens", "completion_tokens")
    csv = read("\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)]))
    lines = read("\n".join(json.dumps(dict(zip(names, row))) for row in rows))
    assert columns(csv) == columns(lines) and csv.arrivals.tolist() == [row[0] for row in rows]
