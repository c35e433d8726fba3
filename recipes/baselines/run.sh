#!/usr/bin/env bash
# The paper's Table 3 in miniature: bash recipes/baselines/run.sh PREPARED [COUNT]. PREPARED is a folder of
# `maisi prepare`. Three baselines learn the same boxes of the same cases for about ten minutes each on one CPU core,
# each makes COUNT volumes (32), and so does the carried model; all are compared with the held-out cases.
# Each step goes on where it was interrupted. On CPUs without bfloat16 set `precision: fp32` in the YAML files.
# The carried model learnt for a day, with more cases: its row shows what there is to reach, not what its conditions gain.
set -euo pipefail
here=recipes/baselines
count=${2:-32}
mkdir -p work/samples work/fid
[ -d work/prepared ] || python $here/cases.py "$1" work/prepared
tiny=$(python -c "from maisi.weights.registry import find_model; print(find_model('tiny').folder)")
cp "$tiny/autoencoder.safetensors" work/autoencoder.safetensors

maisi baseline train ddpm $here/ddpm.yaml -o work/ddpm
maisi baseline train hagan $here/hagan.yaml -o work/hagan
maisi prepare work/prepared --views $here/latents.yaml --autoencoder work/autoencoder.safetensors -o work/latents
maisi train diffusion $here/ldm.yaml -o work/ldm
[ -d work/ldm-model ] || maisi weights assemble --autoencoder work/autoencoder.safetensors \
    --unet work/ldm/unet.safetensors --name ldm -o work/ldm-model

grid=(--size 80,64,64 --spacing 6,6,6 --seed 0 -n "$count")
maisi baseline generate work/ddpm -n "$count" --seed 0 --steps 25 --solver dpm++ -o work/samples/ddpm
maisi baseline generate work/hagan -n "$count" --seed 0 -o work/samples/hagan
maisi generate --model work/ldm-model "${grid[@]}" -o work/samples/ldm
maisi generate --model tiny --region head-neck "${grid[@]}" -o work/samples/maisi

for method in ddpm ldm hagan maisi; do
    [ -d work/fid/$method ] || maisi evaluate fid work/samples/$method work/prepared --split validation \
        --spacing 6,6,6 --size 80,64,64 --metrics fid -o work/fid/$method
done
python $here/table.py work/fid
