#!/usr/bin/env bash
# Train a small mask generator on phantoms and look at what it makes: bash recipes/mask-generator/run.sh
# About a quarter of an hour on one CPU core. Each step goes on where it was interrupted. On CPUs without bfloat16 set
# `precision: fp32` in the YAML files. For maps of real bodies give both files `data: FOLDER` (`maisi prepare`).
set -euo pipefail
mkdir -p work
maisi train mask-autoencoder recipes/mask-generator/autoencoder.yaml -o work/mask-autoencoder
maisi train mask-diffusion recipes/mask-generator/diffusion.yaml -o work/mask-diffusion
tiny=$(python -c "from maisi.weights.registry import find_model; print(find_model('tiny').folder)")
[ -d work/model ] || maisi weights assemble --autoencoder "$tiny/autoencoder.safetensors" --unet "$tiny/unet.safetensors" \
    --controlnet "$tiny/controlnet.safetensors" --mask-autoencoder work/mask-autoencoder/mask_autoencoder.safetensors \
    --mask-unet work/mask-diffusion/mask_unet.safetensors --name tiny-with-masks -o work/model
maisi mask generate --region abdomen --anatomy-size liver=0.9 --model work/model -n 2 -o work/masks
