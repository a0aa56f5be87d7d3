#!/usr/bin/env bash
# The main job in small, on a fresh machine: install, write a small pipeline that draws moving shapes and a dozen clips of a shape
# that it has never seen, train a LoRA with torchrun, sample with and without it, and judge the result. Everything lands in
# runs/quickstart.
set -euo pipefail
case "${1:-}" in
  "") ;;
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
  *) echo "error: $1: there is nothing to choose" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
. launch/install.sh
install plots

out=runs/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$(python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
processes=$([ "$gpus" -gt 2 ] && echo 2 || echo "${gpus/#0/2}")   # the recipe's batch is split over 1 or 2
micro=$((8 / processes))
started=$(date +%s)

rm -rf "$out"
python -m finetune demo --out "$out"
torchrun --nproc_per_node "$processes" -m finetune --recipe recipes/quickstart.toml --set train.micro_batch_size=$micro
python -m finetune sample --recipe recipes/quickstart.toml --set train.micro_batch_size=$micro \
  --adapter "$out/lora_run/lora" --compare --out "$out/samples"
python -m finetune plot --run "$out/lora_run"
verdict=0
python launch/judge.py "$out/lora_run" "$out/samples" "$out/clips" recipes/quickstart.toml || verdict=$?
echo "quickstart finished in $(($(date +%s) - started)) s; look at $out/samples/base_trained_real.png, $out/lora_run/loss.png and $out/lora_run/report.html"
exit $verdict
