#!/usr/bin/env bash
# 建好 .venv 并装依赖：bootstrap.sh 需求文件。依赖没变就立即返回；被打断重跑即可。
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:?用法：bootstrap.sh requirements.txt}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3 python3.12 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  done
fi
[ -n "$python" ] || { echo "需要 Python 3.11 或更新的版本；装好后重跑，或用 PYTHON=/路径/python 指定。" >&2; exit 1; }

stamp=.venv/.$(basename "$requirements").sha256
want=$(cat requirements*.txt constraints.txt pyproject.toml "$0" | sha256sum 2>/dev/null || cat requirements*.txt constraints.txt pyproject.toml "$0" | shasum -a 256)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

if ! [ -x .venv/bin/python ]; then
  echo "建立虚拟环境 .venv（$("$python" --version)）"
  "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)
  if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # uv 认得 PyTorch 官方的 CPU 轮子源，先试它，免得从默认源下载几个 GB 的 CUDA
    echo "没有 GPU，优先安装 CPU 版 torch $version"
    "${pip[@]}" install -q "$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' requirements.txt)"
    UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=0 .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "torch==$version" ||
      { echo "连不上 PyTorch 的 CPU 轮子源，改用默认源（可能附带几个 GB 的 CUDA 依赖）"; "${pip[@]}" install "torch==$version"; }
  fi
fi
echo "安装依赖：$requirements"
"${pip[@]}" install -r "$requirements" -c constraints.txt
"${pip[@]}" install -q --no-deps -e .
printf '%s\n' "$want" > "$stamp"
