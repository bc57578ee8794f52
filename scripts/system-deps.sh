#!/usr/bin/env bash
# 安装系统包：site（画中文图要的字体）、pdf（另加 WeasyPrint 的库）或 test（再加 Chromium）。已有就什么都不做。
set -euo pipefail
want=${1:?用法：system-deps.sh site|pdf|test}

missing=()
fc-list :lang=zh 2>/dev/null | grep -q . || missing+=(fonts-noto-cjk)
if [ "$want" != site ]; then
  if command -v dpkg >/dev/null; then
    for package in libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0; do
      dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
  fi
fi
if [ "$want" = test ]; then
  command -v chromium >/dev/null || command -v google-chrome >/dev/null || command -v chromium-browser >/dev/null || missing+=(chromium)
fi
[ "${#missing[@]}" -eq 0 ] && exit 0

if [ "$(uname)" = Darwin ] && [ "$want" = site ]; then exit 0; fi # macOS 自带中文字体
if ! command -v apt-get >/dev/null; then
  echo "请用系统的包管理器安装：${missing[*]}（中文字体任选其一：Noto Sans CJK、思源黑体、文泉驿；Chromium 或 Chrome 用于浏览器测试），然后重跑。" >&2
  exit 1
fi
sudo=""
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "需要 root 权限安装：${missing[*]}" >&2; exit 1; }
  sudo=sudo
fi
echo "安装系统包：${missing[*]}"
$sudo apt-get update -q
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends fontconfig "${missing[@]}"
