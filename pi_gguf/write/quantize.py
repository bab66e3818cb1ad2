"""One GGUF file to another, quantized by llama.cpp: `quantize`."""

from __future__ import annotations

from pathlib import Path

from pi_gguf.common.files import check_free_disk, check_writable, replace_when_complete, writes
from pi_gguf.common.progress import say, stage
from pi_gguf.errors import GgufError, OptionError
from pi_gguf.gguf.loadable import check_loadable
from pi_gguf.gguf.parts import complete
from pi_gguf.llamacpp.quantizer import UNQUANTIZED, check_quantization, mixture, quantize_file
from pi_gguf.llamacpp.trial import check_quantizes
from pi_gguf.write.imatrix import read_imatrix


@writes("target")
@stage("quantize {source} in llama.cpp")
def quantize(
    source: str | Path,
    target: str | Path,
    *,
    quant: str = "Q4_K_M",
    imatrix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Quantize a GGUF file with llama.cpp.

    Args:
        source: GGUF file to read, of a split one any part; best F32, F16 or BF16.
        target: GGUF file to write.
        quant: any type llama.cpp has, e.g. Q8_0, Q5_K_M or Q4_K_M.
        imatrix: importance matrix, a file of pi-gguf imatrix or of llama.cpp; IQ2, IQ3_XXS and the like need one.
        overwrite: replace the file that is there.

    Returns:
        The path written.

    Example:
        pi-gguf quantize model-f16.gguf model-q4_k_m.gguf --quant Q4_K_M
    """
    source, target = Path(source), Path(target)
    quant = check_quantization(quant, importance=imatrix is not None)
    matrix = read_imatrix(Path(imatrix)) if imatrix is not None else None
    found = complete(source)
    info, source = found.info, found.first.path
    check_loadable(info, texts=False)
    check_writable(target, overwrite)
    if target.exists() and any(target.samefile(part) for part in found.paths):
        raise OptionError(f"{target}: source and target are the same file", "give another target")
    check_quantizes(info.header, quant)
    importance = matrix.importance if matrix else {}
    if matrix:
        types = mixture(source, quant, importance=importance)
        changed = {t.name for t in info.tensors if types.get(t.name, t.type) != t.type}
        matrix.check_fits(str(source), {t.name: t.shape for t in info.tensors}, changed)
    requantize = info.quantization not in UNQUANTIZED
    if requantize:
        say(f"note: {source} is {info.quantization} already; quantizing twice loses more than once")
    check_free_disk(target.parent, sum(t.nbytes for t in info.tensors) // 8)
    with replace_when_complete(target) as partial:
        try:
            quantize_file(
                source, partial, quant, n_tensors=len(info.tensors), requantize=requantize, importance=importance,
                keys=matrix.keys() if matrix else {},
            )  # fmt: skip
        except GgufError:
            check_free_disk(target.parent, sum(t.nbytes for t in info.tensors) // 2)
            raise
    return target
