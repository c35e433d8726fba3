#!/usr/bin/env bash
# bash run.sh CTS TABLE.json: from CTs and masks of a new class to a model that knows it, in work/.
set -euo pipefail
cts=$1 table=$2 here=$(cd "$(dirname "$0")" && pwd)
mkdir -p work
ln -sfn "$(python -c 'from maisi.weights.registry import find_model; print(find_model("tiny").folder)')" work/tiny
python "$here/cases.py" "$cts" "$table" work
maisi prepare work/cases.json -o work/prepared
maisi prepare work/prepared --views "$here/views.yaml" -o work/latents
maisi train controlnet "$here/controlnet.yaml" -o work/controlnet
[ -d work/model ] || maisi weights assemble --autoencoder work/tiny/autoencoder.safetensors \
    --unet work/tiny/unet.safetensors --controlnet work/controlnet/controlnet.safetensors \
    --name mine --storage float16 -o work/model
mask=$(ls work/masks/*.nii.gz | head -n 1)
maisi generate --model work/model --mask "$mask" -n 2 -o work/pairs
