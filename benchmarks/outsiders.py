"""What other programs make of our files: the window that they read, and 32 tokens after two prompts, greedily.

In: Hugging Face models, of which files are made: plain, with a window four times as long (without training), and with a
LoRA adapter merged, each in F16 and Q4_K_M. Readers, each in a process of its own that is killed when it takes too
long: llama.cpp's server in a newer build (xllamacpp), node-llama-cpp, transformers' reading of GGUF, mistral.rs and
OpenVINO GenAI. Out: `benchmarks/outsiders.json`, for each file and reader:

window, scale: what the reader says it read; null where it does not say
tokens, of: how many tokens are ours, up to the first other one after each prompt, of how many (64, or the clear ones)
lead: by how much our logits prefer our token to the next where the reader's is another, in nats
same: every token is ours

One prompt is short, one longer than the window was before it was scaled: there a lost factor cannot hide. Programs
round otherwise (llama.cpp multiplies 4-bit weights with activations in 8 bits, others multiply them out first), which
moves a logit by hundredths; so prompts are taken after which each of our tokens leads the next by `LEAD`, and nothing
is forgiven. Where 32 such tokens follow none of the prompts that are tried, those up to the first doubtful one count.

`usual` is the bundled model with two more heads, of zeros: it computes the same, and its heads share the hidden size,
as those of most Llamas do; mistral.rs knows no other.

Example (five minutes; needs Node.js for node-llama-cpp):
    pip install 'pi-gguf[outsiders]' openvino-genai
    python benchmarks/outsiders.py usual bundled:tiny stories15M --out benchmarks/outsiders.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TOKENS = 32
"""Written after each prompt."""

LEAD = 0.15
"""Of each token before the next likeliest in our own logits, in nats, at least."""

FACTOR = 4
KINDS = ("plain", f"PI x{FACTOR}", "LoRA merged")
QUANTS = ("F16", "Q4_K_M")

_SECONDS = 60
"""For each file, after which a reader is killed."""

_NODE = ROOT / "build" / "node-llama-cpp"
_NODE_VERSION = "3.22.1"


@dataclass(frozen=True)
class Question:
    """A file, and what a reader is to continue of it.

    Args:
        path: of the file.
        window: to open, in tokens.
        prompts: texts.
        begin: spelling of the token that the file has put before a text, for readers that do not put it.
    """

    path: str
    window: int
    prompts: list[str]
    begin: str


@dataclass(frozen=True)
class Answer:
    """What a reader says of a file.

    Args:
        window: that it read, in tokens; None where it does not say.
        scale: that it multiplies positions with; None where it does not say.
        texts: written after each prompt; None where it does not open the file.
        ids: their tokens; None where it does not say.
        error: why it does not open the file.
    """

    window: int | None = None
    scale: float | None = None
    texts: list[str] | None = None
    ids: list[list[int]] | None = None
    error: str | None = None


# Readers: each is run by a child process, `python outsiders.py --read NAME`


def read_by_xllamacpp(question: Question) -> Answer:
    """llama.cpp's server in the process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = question.path, question.window, 1, False
    params.fit_params, params.cpuparams.n_threads = False, 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    texts, ids = [], []
    for prompt in question.prompts:
        asked = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found = _json(f"{server.listening_address}/completion", asked)
        texts.append(found["content"])
        ids.append(found["tokens"])
    (model,) = _json(f"{server.listening_address}/v1/models")["data"]
    return Answer(model["meta"]["n_ctx_train"], None, texts, ids)


def _json(url: str, body: Any = None) -> Any:
    import urllib.request

    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.loads(answer.read())


def read_by_transformers(question: Question) -> Answer:
    """GGUF read into a transformers model, in 32 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    torch.set_num_threads(1)
    folder, name = os.path.split(question.path)
    how = {"gguf_file": name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    model = AutoModelForCausalLM.from_pretrained(
        folder, **how, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    texts, ids = [], []
    for prompt in question.prompts:
        given = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)[0, given.input_ids.shape[1] :]
        ids.append(found.tolist())
        texts.append(tokenizer.decode(found, skip_special_tokens=True))
    rope = getattr(model.config, "rope_parameters", None) or {}
    scale = 1 / rope.get("factor", 1.0) if rope.get("rope_type", "default") in ("default", "linear") else None
    return Answer(model.config.max_position_embeddings, scale, texts, ids)


def read_by_mistralrs(question: Question) -> Answer:
    """mistral.rs, which tells texts, not tokens, and puts no begin token before a text."""
    import mistralrs

    folder, name = os.path.split(question.path)
    runner = mistralrs.Runner(mistralrs.Which.GGUF(folder, name), no_paged_attn=True, num_device_layers=None)
    texts = []
    for prompt in question.prompts:
        asked = mistralrs.CompletionRequest(
            prompt=question.begin + prompt, model="model", max_tokens=TOKENS, temperature=0.0
        )
        texts.append(runner.send_completion_request(asked).choices[0].text)
    return Answer(runner.max_sequence_length(), None, texts)


def read_by_openvino(question: Question) -> Answer:
    """OpenVINO GenAI, in 32 bits; it puts no begin token before a text either."""
    import openvino_genai

    hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f16", "INFERENCE_NUM_THREADS": 1}
    pipeline = openvino_genai.LLMPipeline(question.path, "CPU", **hints)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = TOKENS, False, False
    return Answer(texts=[pipeline.generate([question.begin + prompt], config).texts[0] for prompt in question.prompts])


@dataclass(frozen=True)
class Reader:
    """A program of others.

    Args:
        read: opens a file and continues prompts, in a child process; None where Node.js runs it.
        package: its name in a registry.
        install: how it is installed.
    """

    read: Any
    package: str
    install: str = "pip install 'pi-gguf[outsiders]'"

    def missing(self) -> str | None:
        """Say what it needs that is not there."""
        if self.read is None:
            return _install_node()
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"needs {self.package}: {self.install}"
        return None

    def version(self) -> str:
        return _NODE_VERSION if self.read is None else importlib.metadata.version(self.package)


READERS = {
    "llama.cpp (xllamacpp)": Reader(read_by_xllamacpp, "xllamacpp"),
    "node-llama-cpp": Reader(None, "node-llama-cpp"),
    "transformers": Reader(read_by_transformers, "transformers"),
    "mistral.rs": Reader(read_by_mistralrs, "mistralrs"),
    "OpenVINO GenAI": Reader(read_by_openvino, "openvino-genai", "pip install openvino-genai"),
}


def _install_node() -> str | None:
    """Install node-llama-cpp once, with llama.cpp as its own package brings it; nothing is compiled or fetched."""
    if not shutil.which("node") or not shutil.which("npm"):
        return "needs Node.js with npm"
    there = _NODE / "node_modules" / "@node-llama-cpp" / "linux-x64" / "package.json"
    if not there.exists() or json.loads(there.read_text())["version"] != _NODE_VERSION:
        _NODE.mkdir(parents=True, exist_ok=True)
        packages = [f"{name}@{_NODE_VERSION}" for name in ("node-llama-cpp", "@node-llama-cpp/linux-x64")]
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
        command = ["npm", "install", "--prefix", str(_NODE), *quiet, *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            return f"npm cannot install node-llama-cpp: {done.stderr[-300:]}"
    return None


def ask(name: str, questions: Sequence[Question]) -> list[Answer]:
    """Ask a reader in a child process.

    A child that dies, or is killed as it takes too long, answers with its last words for the file it was at and all
    behind it.
    """
    script = Path(__file__)
    command = [sys.executable, str(script), "--read", name]
    if READERS[name].read is None:
        command = ["node", str(script.with_suffix(".mjs")), str(_NODE / "node_modules" / "node-llama-cpp"), str(TOKENS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    seconds = _SECONDS * len(questions)
    given = "".join(json.dumps(asdict(question)) + "\n" for question in questions)
    try:
        done = subprocess.run(
            command, input=given, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
        out, said = done.stdout, done.stderr.strip().splitlines()[-1:]
        why = f"ended with {done.returncode}: {' '.join(said)}"[:300]
    except subprocess.TimeoutExpired as error:
        out, why = (error.stdout or b"").decode(errors="replace"), f"took more than {seconds} seconds"
    answers = [Answer(**json.loads(line[len(_MARK) :])) for line in out.splitlines() if line.startswith(_MARK)]
    return answers + [Answer(error=why)] * (len(questions) - len(answers))


_MARK = "answer: "


def _read(name: str) -> None:
    for line in sys.stdin:
        try:
            found = READERS[name].read(Question(**json.loads(line)))
        except Exception as error:
            found = Answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:120])
        print(f"\n{_MARK}{json.dumps(asdict(found))}", flush=True)


# Ours


@dataclass(frozen=True)
class Ours:
    """What we read of a file, and what we write after its prompts.

    Args:
        window: in tokens.
        scale: that positions are multiplied with.
        ids: tokens after each prompt.
        texts: of the first 1, 2, ... of them.
        leads: of each before the next likeliest, in nats.
    """

    window: int
    scale: float
    ids: list[list[int]]
    texts: list[list[str]]
    leads: list[list[float]]


def choose(path: Path, window: int, beginnings: Sequence[str], ends: Sequence[str]) -> tuple[Question, Ours]:
    """Find a prompt for each beginning after which every token leads clearly, and continue it ourselves.

    Args:
        beginnings: of prompts.
        ends: to be tried behind each of them.
    """
    from pi_gguf.runtime.model import Model

    prompts, ids, texts, leads = [], [], [], []
    with Model(path, n_ctx=window, type_k="f16", device="cpu", n_threads=1) as model:
        for beginning in beginnings:
            best: tuple[list[int], list[float], str] = ([], [], "")
            for prompt in (f"{beginning} {end}".strip() for end in ends):
                best = max(best, (*_write(model, model.tokenize(prompt)), prompt), key=lambda one: len(one[0]))
                if len(best[0]) == TOKENS:
                    break
            written, leading, prompt = best
            prompts.append(prompt)
            ids.append(written)
            texts.append([_plain(model.detokenize(written[: i + 1])) for i in range(len(written))])
            leads.append(leading)
        begin = "".join(model.info.header.entries["tokenizer.ggml.tokens"].value[i] for i in model.bos)
        return Question(str(path), window, prompts, begin), Ours(
            model.n_ctx_train, model.rope_freq_scale_train, ids, texts, leads
        )


def _write(model: Any, read: list[int]) -> tuple[list[int], list[float]]:
    """Return what a model writes greedily, up to a token that does not lead clearly, and by how much each leads."""
    begin, leads = len(read), []
    for _ in range(TOKENS):
        (row,) = next(iter(model.logits_chunks(read, 1)))
        token = int(row.argmax())
        lead = float(row[token] - max(row[:token].max(initial=-1e9), row[token + 1 :].max(initial=-1e9)))
        if lead < LEAD or model.is_end(token):
            break
        read.append(token)
        leads.append(lead)
    return read[begin:], leads


def _plain(text: str) -> str:
    """Return a text without what programs show otherwise: half characters, control codes, white space at its ends."""
    return "".join(c for c in text if (c.isprintable() and c != "\ufffd") or c == "\n").strip()


@dataclass(frozen=True)
class Row:
    """A file in a reader, beside ours; see this module's text."""

    window: int | None
    scale: float | None
    tokens: int
    of: int
    lead: float | None
    same: bool
    error: str | None = None


def compare(ours: Ours, theirs: Answer) -> Row:
    """Hold what a reader wrote against what we wrote."""
    from pi_gguf.measure.language_model import common_prefix

    if theirs.texts is None:
        return Row(None, None, 0, sum(map(len, ours.ids)), None, False, theirs.error)
    count, leads = 0, []
    for i, ids in enumerate(ours.ids):
        if theirs.ids is not None:
            equal = common_prefix(ids, theirs.ids[i])
        else:
            text = _plain(theirs.texts[i])
            equal = sum(text.startswith(begin) for begin in ours.texts[i])
        count += equal
        if equal < len(ids):
            leads.append(ours.leads[i][equal])
    of = sum(map(len, ours.ids))
    return Row(theirs.window, theirs.scale, count, of, round(max(leads), 3) if leads else None, count == of)


# Files


def make_usual(path: Path) -> Path:
    """Save the bundled model with two more heads, whose weights are zero."""
    import torch

    from pi_gguf.bundled import TINY, TINY_DIR
    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    model = load_checkpoint(TINY).load_model(dtype=torch.float32)
    config, size = model.config, model.config.hidden_size
    config.num_attention_heads = config.num_key_value_heads = size // config.head_dim
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = getattr(layer.self_attn, name)
            whole = torch.zeros(size, size)
            whole[: matrix.weight.shape[0], : matrix.weight.shape[1]] = matrix.weight.detach()
            matrix.weight = torch.nn.Parameter(whole)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_DIR / name, path)
    return path


def make_files(
    model: str, folder: Path, kinds: Sequence[str] = KINDS, quants: Sequence[str] = QUANTS
) -> dict[str, tuple[Question, Ours]]:
    """Write the files of a model; return by `KIND, QUANT` what is asked about each, and what we say."""
    import pi_gguf
    from pi_gguf import bundled
    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    words = next(iter(bundled.novels("heldout").values())).split()
    ends = [" ".join(words[i : i + 12]) for i in range(6000, 12000, 60)]
    window = load_checkpoint(model, config_only=True).rope.max_position_embeddings
    made = {}
    for kind in kinds:
        longer = FACTOR * window if kind.startswith("PI") else window
        options: dict[str, Any] = {"context": longer, "steps": 0} if longer > window else {}
        if kind.startswith("LoRA"):
            options = {"lora": [str(_make_adapter(model, folder / "adapter"))]}
        for quant in quants:
            path = folder / f"{re.sub('[^A-Za-z0-9]+', '-', kind)}-{quant}.gguf"
            pi_gguf.convert(model, path, quant=quant, check="none", certify=False, **options)
            long = _words(path, words, round(1.1 * window) if longer > window else window // 2)
            made[f"{kind}, {quant}"] = choose(path, longer, ["", long], ends)
    return made


def _words(path: Path, words: Sequence[str], tokens: int) -> str:
    """Return words of so many tokens or a few more."""
    from pi_gguf.runtime.model import Model

    with Model(path, n_ctx=256, type_k="f16", device="cpu", n_threads=1) as model:
        count = next(n for n in range(tokens // 4, len(words), 8) if len(model.tokenize(" ".join(words[:n]))) >= tokens)
    return " ".join(words[:count])


def _make_adapter(model: str, path: Path) -> Path:
    """Save a random adapter of a model, once."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pi_gguf.checkpoint.checkpoint import load_checkpoint

    if not path.exists():
        torch.manual_seed(1)
        base = load_checkpoint(model).load_model(dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj", "up_proj"])
        get_peft_model(base, config).save_pretrained(path)
    return path


def measure(models: Sequence[str], readers: Sequence[str]) -> dict[str, Any]:
    """Ask readers about the files of models; what is missing here is said in place of rows."""
    from pi_gguf.common.progress import say

    found: dict[str, Any] = {"readers": {}, "ours": {}, "rows": {}}
    with tempfile.TemporaryDirectory() as name:
        made: dict[str, tuple[Question, Ours]] = {}
        for model in models:
            short = Path(model.removeprefix("bundled:")).name
            folder = Path(name, short)
            folder.mkdir()
            source = str(make_usual(folder / "hf")) if model == "usual" else model
            made |= {f"{short}, {file}": one for file, one in make_files(source, folder).items()}
        found["ours"] = {file: {"window": ours.window, "scale": ours.scale} for file, (_, ours) in made.items()}
        for reader in readers:
            missing = READERS[reader].missing()
            found["readers"][reader] = missing or READERS[reader].version()
            if missing:
                continue
            say(f"{reader} {READERS[reader].version()}: {len(made)} files")
            answers = ask(reader, [question for question, _ in made.values()])
            found["rows"][reader] = {
                file: asdict(compare(ours, answer))
                for (file, (_, ours)), answer in zip(made.items(), answers, strict=True)
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of Hugging Face models, bundled:tiny, or usual")
    parser.add_argument("--readers", default=",".join(READERS), help="names, separated by commas")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        _read(options.read)
        return
    from pi_gguf.common.provenance import provenance, without_folders

    found = measure(options.models or ["usual"], options.readers.split(","))
    record = {**provenance(seed=1, device="cpu"), "tokens": TOKENS, "lead": LEAD, **found}
    text = json.dumps(without_folders(record), indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
