"""The command line in real processes: exit codes, stdout and stderr."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf_models import write_gguf
from tiny import write_tiny_llama

from specserve.cli import main
from specserve.cli.flags import flag_type, given
from specserve.cli.machine import cache_folder, processor
from specserve.cli.parser import SAMPLING_HELP, SERVER_HELP, build_parser, engine_config
from specserve.cli.prompts import read_prompts
from specserve.cli.runtime import check_driver
from specserve.config import ConfigError, EngineConfig
from specserve.field_help import ENGINE_HELP
from specserve.types import SamplingParams

KEYS = {"index", "text", "token_ids", "finish_reason", "usage", "speculation", "timing"}
USAGE_KEYS = {"prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"}
SPECULATION_KEYS = {
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "mean_acceptance_length",
    "acceptance_histogram",
}
TINY = ["--raw", "--device", "cpu", "--dtype", "float32", "--kv-memory", "4MiB"]
GREEDY = ["--temperature", "0", "--max-tokens", "24", "--ignore-eos"]


def specserve(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "specserve.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **env},
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process, where torch is loaded already."""
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_help_and_print_config_do_not_import_torch() -> None:
    program = (
        "import sys; from specserve.cli import main; main(['generate', '--print-config']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0
    assert msgspec.convert(tomllib.loads(done.stdout.decode()), EngineConfig) == EngineConfig()


# Modules that `generate` has no use for, and that take long to import.
NEEDLESS = {
    *("aiohttp", "huggingface_hub", "matplotlib", "pandas", "requests", "rich", "scipy", "sympy"),
    *("torch._dynamo", "torch._inductor", "torchvision", "transformers", "triton", "uvloop"),
}


def test_generate_imports_only_what_it_needs(tiny_model: Path) -> None:
    program = (
        "import sys; from specserve.cli import main; "
        f"status = main(['generate', {str(tiny_model)!r}, '--prompt', 'a', *{TINY}]); "
        f"sys.exit(status or ' '.join(sorted({NEEDLESS} & set(sys.modules))) or 0)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (0, []), done.stderr


def test_every_field_is_a_flag_with_help() -> None:
    fields = {
        name
        for section in msgspec.structs.fields(EngineConfig)
        for name in section.type.__struct_fields__
    }
    assert set(SAMPLING_HELP) == set(SamplingParams.__struct_fields__)
    assert set(ENGINE_HELP) | set(SERVER_HELP) == fields - {"target"}


def test_every_sampling_flag_is_parsed() -> None:
    values: dict[str, tuple[list[str], Any]] = {
        "temperature": (["0.5"], 0.5),
        "top_k": (["7"], 7),
        "top_p": (["0.9"], 0.9),
        "min_p": (["0.05"], 0.05),
        "presence_penalty": (["-0.5"], -0.5),
        "frequency_penalty": (["0.25"], 0.25),
        "repetition_penalty": (["1.1"], 1.1),
        "logit_bias": (["5=-100", "6=1.5"], {5: -100.0, 6: 1.5}),
        "max_tokens": (["9"], 9),
        "min_tokens": (["2"], 2),
        "stop": (["a", "b c"], ("a", "b c")),
        "stop_token_ids": (["3", "4"], (3, 4)),
        "seed": (["11"], 11),
        "logprobs": (["2"], 2),
        "prompt_logprobs": (["4"], 4),
        "n": (["3"], 3),
    }
    switches: dict[str, Any] = {
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    assert {*values, *switches} == set(SamplingParams.__struct_fields__)
    line = ["generate", "--ignore-eos", "--no-skip-special-tokens", "--include-stop-str-in-output"]
    for name, (texts, _) in values.items():
        for text in texts:
            line += [f"--{name.replace('_', '-')}", text]
    arrived = SamplingParams(**given(build_parser().parse_args(line), SamplingParams))
    wanted = {name: value for name, (_, value) in values.items()}
    assert arrived == SamplingParams(**switches, **wanted)


def test_engine_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "specserve.toml"
    file.write_text('[target]\ntarget = "there"\n[cache]\nblock_size = 32\nkv_memory = "1GiB"\n')
    line = f"generate --config {file} --batch 5 --draft ngram --draft other --kv-memory 2GiB"
    line += " --no-prefix-caching --options ngram.max_match=3 --options x.name=word"
    config = engine_config(build_parser().parse_args(line.split()))
    assert config.target.target == "there"
    assert config.schedule.max_num_seqs == 5
    assert config.draft.draft == ("ngram", "other")
    assert config.draft.options == {"ngram": {"max_match": 3}, "x": {"name": "word"}}
    assert config.cache.block_size == 32
    assert config.cache.kv_memory == "2GiB"
    assert not config.cache.prefix_caching


def test_printed_settings_are_a_config_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For `serve` too, whose own section `generate` prints and ignores."""
    flags = ["--draft", "ngram", "--options", "ngram.max_match=3", "--threads", "2", "--batch", "5"]
    status, printed, _ = call(capsys, "generate", "there", *flags, "--print-config")
    assert status == 0
    (file := tmp_path / "specserve.toml").write_text(printed)
    for command in ("generate", "serve"):
        assert call(capsys, command, "--config", str(file), "--print-config")[1] == printed


@pytest.mark.parametrize("flag", ["--options=max_match=3", "--logit-bias=5", "--logit-bias=a=b"])
def test_the_error_for_a_malformed_pair_shows_the_form(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["generate", flag])
    value = flag.split("=", 1)[1]
    assert f"{value!r} is not " in (error := capsys.readouterr().err)
    assert "such as" in error


def test_a_field_of_an_unsupported_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="no flag"):
        flag_type(set[int])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--temprature", "1"], "unrecognized arguments: --temprature"),
        (["generate", "--prompt", "x", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["generate", "--logit-bias", "5"], "--logit-bias"),
        (["generate", "--options", "max_match=3"], "--options"),
        (["generate", "--chat", "--raw"], "not allowed with"),
        (["generate", "--device", "cpu", "--tempera", "1"], "unrecognized"),
        (["generate"], "prompt: there is none"),
        (["generate", "--max-nodes", "65", "--prompt", "x"], "max_nodes: 65 is out of range"),
        (["generate", "--prompts", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["generate", "nowhere", "--prompt", "x"], "target: 'nowhere'"),
        (["pull", "nowhere"], "target: 'nowhere'"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_has_exit_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        status = main(arguments)
    except SystemExit as exit_:  # argparse
        status = int(str(exit_.code))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.splitlines()[-1].startswith("specserve")


def test_errors_have_no_traceback() -> None:
    done = specserve("generate", "nowhere", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("specserve: error: target: 'nowhere'")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "specserve.toml"
    file.write_text("[cache]\nblock_sise = 16\n")
    done = specserve("generate", "--prompt", "x", "--config", str(file))
    assert done.returncode == 2
    assert f"{file}: cache.block_sise: unknown setting" in done.stderr
    assert "did you mean 'block_size'" in done.stderr


def test_a_drafter_that_does_not_fit_is_named(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    line = ["generate", str(tiny_model), *TINY, "--prompt", "w1", "--draft", "ngran"]
    status, _, err = call(capsys, *line)
    assert status == 2
    assert "did you mean 'ngram'" in err


def test_every_kind_of_row(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    kinds: list[Any] = [
        "text",
        {"prompt": "field"},
        {"messages": messages},
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
    ]
    file.write_text("\n\n".join(json.dumps(kind) for kind in kinds))
    assert read_prompts(["flag"], file) == ["flag", "text", "field", messages, "first"]


@pytest.mark.parametrize(
    "row",
    [
        *("{", "3", "{}", "[1, 2]", '{"turns": []}', '{"prompt": 1}'),
        *('{"messages": "x"}', '{"messages": []}', '{"messages": [{"role": "user"}]}'),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{row}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2 .*expected"):
        read_prompts([], file)


def test_a_file_without_prompts_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    with pytest.raises(ConfigError, match=r"prompts: .*prompts\.jsonl is empty"):
        read_prompts([], file)


def test_messages_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "u"}]}')
    status, _, err = call(capsys, "generate", "--raw", "--prompts", str(file))
    assert status == 2
    assert "raw:" in err


@pytest.fixture(scope="module")
def tiny_json(tiny_model: Path) -> subprocess.CompletedProcess[str]:
    prompts = ["--prompt", "w1 w2 w3", "--prompt", "w4 w5 w6 w4 w5"]
    return specserve("generate", str(tiny_model), *TINY, *GREEDY, *prompts, "--json")


def test_json_has_exactly_the_documented_keys(tiny_json: subprocess.CompletedProcess[str]) -> None:
    assert tiny_json.returncode == 0, tiny_json.stderr
    assert tiny_json.stderr == ""
    first, second = rows(tiny_json.stdout)
    assert set(first) == set(second) == KEYS
    assert set(first["usage"]) == USAGE_KEYS
    assert set(first["speculation"]) == SPECULATION_KEYS
    assert set(first["timing"]) == {"ttft_s", "tpot_s", "total_s"}
    assert [first["index"], second["index"]] == [0, 1]
    assert second["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 24,
        "total_tokens": 29,
        "cached_tokens": 0,
    }
    assert len(second["token_ids"]) == 24
    assert second["finish_reason"] == "length"
    speculation = second["speculation"]
    assert sum(speculation["acceptance_histogram"]) == speculation["num_spec_steps"]
    assert speculation["mean_acceptance_length"] == 24 / speculation["num_spec_steps"]


def test_batch_and_draft_do_not_change_the_output(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_json: subprocess.CompletedProcess[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"w1 w2 w3"\n{"prompt": "w4 w5 w6 w4 w5"}\n"w9"\n')
    line = ["generate", str(tiny_model), *TINY, *GREEDY, "--json", "--prompts", str(file)]
    expected = [row["token_ids"] for row in rows(tiny_json.stdout)]
    for more in (["--batch", "1"], ["--draft", "none"], ["--batch", "3", "--max-nodes", "4"]):
        status, out, _ = call(capsys, *line, *more)
        assert status == 0
        assert [row["token_ids"] for row in rows(out)][:2] == expected
        assert [row["index"] for row in rows(out)] == [0, 1, 2]


def test_text_is_streamed_and_followed_by_a_summary(
    tiny_model: Path, tiny_json: subprocess.CompletedProcess[str]
) -> None:
    done = specserve("generate", str(tiny_model), *TINY, *GREEDY, "--prompt", "w1 w2 w3")
    assert done.returncode == 0
    assert done.stdout == rows(tiny_json.stdout)[0]["text"] + "\n"
    assert done.stderr.startswith("[24 tokens in ")


def test_several_texts_have_headings(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_json: subprocess.CompletedProcess[str],
) -> None:
    prompts = ["--prompt", "w1 w2 w3", "--prompt", "w4 w5 w6 w4 w5"]
    status, out, err = call(capsys, "generate", str(tiny_model), *TINY, *GREEDY, *prompts)
    texts = [row["text"] for row in rows(tiny_json.stdout)]
    assert status == 0
    assert out == f"--- 0 (length)\n{texts[0]}\n--- 1 (length)\n{texts[1]}\n"
    assert err.startswith("[48 tokens in ")


def test_a_prediction_does_not_change_the_output(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_json: subprocess.CompletedProcess[str],
) -> None:
    plain = rows(tiny_json.stdout)[0]
    line = ["generate", str(tiny_model), *TINY, *GREEDY, "--prompt", "w1 w2 w3", "--json"]
    line += ["--no-cost-aware"]  # on some machines fewer nodes are worth their rows
    status, out, _ = call(capsys, *line, "--prediction", plain["text"])
    (predicted,) = rows(out)
    assert status == 0
    assert predicted["token_ids"] == plain["token_ids"]
    assert predicted["speculation"]["num_spec_steps"] <= 4  # 24 tokens, 8 nodes a pass


def test_samples_and_logprobs_are_shown_if_requested(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    line = ["generate", str(tiny_model), *TINY, "--prompt", "w1 w2", "--json", "--seed", "3"]
    line += ["--max-tokens", "6", "--ignore-eos"]
    status, out, _ = call(capsys, *line, "--n", "2", "--logprobs", "2", "--prompt-logprobs", "1")
    first, second = rows(out)
    assert status == 0
    assert set(second) == KEYS | {"sample", "logprobs"}
    assert set(first) == set(second) | {"prompt_logprobs"}
    beginning, entry = first["prompt_logprobs"]
    assert beginning is None
    assert entry["logprob"] <= entry["top"][0][1] <= 0
    assert [first["sample"], second["sample"]] == [0, 1]
    assert first["token_ids"] != second["token_ids"]
    assert [entry["token_id"] for entry in first["logprobs"]] == first["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in first["logprobs"])


def test_one_bad_prompt_does_not_affect_the_others(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_json: subprocess.CompletedProcess[str],
) -> None:
    prompts = ["--prompt", "w1 w2 w3", "--prompt", "w1 " * 600, "--prompt", ""]
    line = ["generate", str(tiny_model), *TINY, *GREEDY, *prompts]
    status, out, err = call(capsys, *line, "--json")
    fine, too_long, empty = rows(out)
    assert status == 1
    assert fine["token_ids"] == rows(tiny_json.stdout)[0]["token_ids"]
    assert set(fine) == KEYS
    assert set(too_long) == KEYS | {"error"}
    assert too_long["finish_reason"] == empty["finish_reason"] == "error"
    assert "context of 512" in too_long["error"]
    assert "empty" in empty["error"]
    assert [line.split(": ")[2] for line in err.splitlines()] == ["prompt 1", "prompt 2"]


def test_a_sampling_value_out_of_range_has_exit_code_1(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    line = ["generate", str(tiny_model), *TINY, "--prompt", "w1", "--temperature", "nan"]
    status, out, err = call(capsys, *line)
    assert (status, out) == (1, "")
    assert err.startswith("specserve: error: temperature: nan is out of range")


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "specserve.cli", "generate", "--print-config"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_quiet(tmp_path: Path) -> None:
    target = write_tiny_llama(tmp_path, seed=1, context=32768)  # it must not finish before
    line = ["generate", str(target), *TINY, "--prompt", "w1", "--draft", "none"]
    line += ["--max-tokens", "30000", "--ignore-eos", "--kv-memory", "16MiB"]
    with subprocess.Popen(
        [sys.executable, "-m", "specserve.cli", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs, and so these tests, with interrupts ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


@pytest.mark.slow
def test_the_default_model_answers_a_chat(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"question_id": 1, "category": "qa", "turns": ["What is the capital of Japan?"]}\n'
        '{"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}\n'
    )
    line = ["generate", "--prompts", str(file), "--temperature", "0", "--max-tokens", "12"]
    done = specserve(*line, "--json", "--kv-memory", "64MiB", "--threads", "1")
    assert done.returncode == 0, done.stderr
    first, second = rows(done.stdout)
    assert "Tokyo" in first["text"]
    assert "Tokyo" in second["text"]


def test_pull_prints_the_directory(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    assert call(capsys, "pull", str(tiny_model)) == (0, f"{tiny_model}\n", "")


def test_doctor_reports_what_will_be_used(tiny_model: Path, tmp_path: Path) -> None:
    line = ["doctor", str(tiny_model), "--json", "--device", "cpu", "--kv-memory", "4MiB"]
    done = specserve(*line, XDG_CACHE_HOME=str(tmp_path))
    report = json.loads(done.stdout)
    checks = {(check["section"], check["name"]): check for check in report["checks"]}
    broken = [check for check in report["checks"] if check.get("status") == "broken"]
    assert (done.returncode, report["ok"], broken) == (0, True, [])
    assert checks["use", "device"]["value"] == "cpu: as set"
    assert checks["use", "exactness"]["value"].startswith("exact")
    assert checks["cache", "folder"]["value"] == str(tmp_path / "specserve")
    assert "LlamaForCausalLM" in checks["use", "target"]["value"]
    dtype, why = checks["use", "weights"]["value"].split(": ")
    assert dtype in ("bfloat16", "float32")  # depends on the instructions of the CPU
    assert why == "the checkpoint's weights are floats"
    assert "a context holds up to 512" in checks["use", "KV"]["value"]
    assert {"python", "torch", "tokenizers"} <= {name for _, name in checks}


def test_doctor_without_a_model_or_a_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    status, out, _ = call(capsys, "doctor", "--device", "cpu")
    assert status == 0
    assert "smollm2-135m: not fetched yet  [note]" in out
    assert not (tmp_path / "none").exists()


def test_doctor_reads_a_gguf_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = write_gguf(tmp_path / "tiny.gguf")
    status, out, _ = call(capsys, "doctor", str(file), "--device", "cpu", "--kv-memory", "4MiB")
    assert status == 0
    assert "LlamaForCausalLM, 2 layers" in out
    assert "a context holds up to" in out
    file.write_bytes(b"no GGUF file")
    status, out, _ = call(capsys, "doctor", str(file), "--device", "cpu")
    assert status == 1
    assert "tiny.gguf" in out.partition("[broken]")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: unknown"),
        (["nowhere.gguf"], "nowhere.gguf: unknown"),
        (["/no/where"], "/no/where: unknown"),
        (["--device", "cuda:99"], "device: 'cuda:99' is not there"),
        (["--device", "toaster"], "device: 'toaster' is not a device"),
        (["--kv-memory", "1"], "kv_memory: 1 bytes"),
    ],
)
def test_doctor_has_exit_code_1_if_something_is_broken(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, arguments: list[str], words: str
) -> None:
    target = [str(tiny_model)] if arguments[0].startswith("--") else []
    status, out, _ = call(capsys, "doctor", *target, *arguments)
    assert status == 1
    assert words in out
    assert "[broken]" in out


def test_a_cache_folder_that_cannot_be_made_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (check,) = cache_folder(tmp_path / "file" / "specserve")
    assert check.status == "broken"
    assert check.fix is not None
    assert "XDG_CACHE_HOME" in check.fix


def test_the_processor_is_read_from_its_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some CPU\nflags\t\t: avx2 avx_vnni\n\nmodel name\t: other\n")
    values = {check.name: check.value for check in processor(cpuinfo)}
    assert values["model"] == "Some CPU"
    assert values["instructions"] == "AVX2 VNNI (not there: AVX512 BF16 AMX)"


@pytest.mark.parametrize(
    ("found", "known", "built", "status", "words"),
    [
        (None, None, None, "ok", "no NVIDIA driver"),
        (None, None, "13.0", "ok", "no NVIDIA driver"),
        ("570.1", None, "13.0", "broken", "libcuda.so.1 does not load"),
        ("570.1", (12, 8), None, "note", "has no CUDA"),
        ("570.1", (12, 4), "12.8", "ok", "CUDA up to 12.4"),
        ("570.1", (12, 8), "13.0", "broken", "built with CUDA 13.0"),
        (None, (13, 0), "12.8", "ok", "version unknown"),
    ],
)
def test_the_driver_is_compared_with_torch(
    found: str | None,
    known: tuple[int, int] | None,
    built: str | None,
    status: str,
    words: str,
) -> None:
    (check,) = check_driver(found, known, built, "2.13.0")
    assert check.status == status
    assert words in check.value
    assert (check.fix is None) == (status == "ok")
