#!/usr/bin/env bash
# Train the carried model anew: bash recipes/tiny/run.sh DATA. Each step goes on where it was interrupted.
# On two CPU cores this takes about a day. On CPUs without bfloat16 set `precision: fp32` in the YAML files.
set -euo pipefail
data=$1
mkdir -p work
python recipes/tiny/cases.py "$data" work/cases.json
maisi prepare work/cases.json -o work/prepared
maisi train autoencoder recipes/tiny/autoencoder.yaml -o work/autoencoder
maisi train autoencoder recipes/tiny/decoder.yaml -o work/decoder
[ -f work/fitted.safetensors ] || python recipes/tiny/last_layer.py work/decoder/autoencoder.safetensors \
    --data work/prepared -o work/fitted.safetensors
maisi prepare work/prepared --views recipes/tiny/latents.yaml \
    --autoencoder work/autoencoder/autoencoder.safetensors -o work/latents
maisi train diffusion recipes/tiny/coarse.yaml -o work/coarse
maisi train diffusion recipes/tiny/diffusion.yaml -o work/diffusion
maisi prepare work/prepared --views recipes/tiny/pairs.yaml \
    --autoencoder work/autoencoder/autoencoder.safetensors -o work/pairs
maisi train controlnet recipes/tiny/controlnet.yaml -o work/controlnet
[ -d work/heads ] || python recipes/baselines/cases.py work/prepared work/heads \
    "mandible,spinal cord,brainstem,parotid gland left,parotid gland right"
maisi train mask-autoencoder recipes/tiny/mask_autoencoder.yaml -o work/mask-autoencoder
maisi train mask-diffusion recipes/tiny/mask_diffusion.yaml -o work/mask-diffusion
[ -f work/ranges.json ] || maisi quality learn work/prepared --split train --least 10 -o work/ranges.json
networks=(work/fitted.safetensors work/diffusion/unet.safetensors work/controlnet/controlnet.safetensors
    work/mask-autoencoder/mask_autoencoder.safetensors work/mask-diffusion/mask_unet.safetensors)
# the label maps that come with the model are the first its own mask networks make
[ -d work/without ] || python recipes/tiny/assemble.py "${networks[@]}" work/ranges.json - work/without
maisi mask generate --region head-neck --spacing 2.5,2.5,2.5 --model work/without -n 12 -o work/maps
[ -d work/library ] || maisi mask library build work/maps --note "made by tiny's mask networks" -o work/library
[ -d work/tiny ] || python recipes/tiny/assemble.py "${networks[@]}" work/ranges.json work/library work/tiny
python recipes/tiny/evaluate.py --model work/tiny --data work/prepared -o work/evaluation
