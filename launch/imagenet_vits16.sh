#!/usr/bin/env bash
# ViT-S/16 on ImageNet-1k, DINO and MAE jointly, 100 epochs at a global batch of 1024; then k-NN and the linear probe.
#
#   command    IMAGENET=/datasets/imagenet LAUNCH=my_slurm.yaml launch/imagenet_vits16.sh
#   data       IMAGENET holds train/ and val/ with one folder per class (or set TRAIN and VAL to specs of your own,
#              e.g. TRAIN='tar:/datasets/imagenet/train-*.tar')
#   hardware   one node with 8 GPUs (a copy of launch/slurm.yaml says so); any number gives the same batch
#   hours      not yet measured
#   numbers    not yet measured
#
# DRY=--dry-run shows what would be submitted. The same command follows or resumes the jobs.
set -euo pipefail

LAUNCH=${LAUNCH:-slurm}
OUT=${OUT:-runs/imagenet_vits16}
TRAIN=${TRAIN:-folder:${IMAGENET:?set IMAGENET to the folder that holds train/ and val/}/train}
VAL=${VAL:-folder:${IMAGENET:-}/val}

sslvit submit --launch "$LAUNCH" --follow ${DRY:-} pretrain --output-dir "$OUT" \
    data="$TRAIN" val_data="$VAL" \
    encoder.name=vit_small_patch16_224 encoder.patch_size=16 encoder.image_size=224 encoder.drop_path_rate=0.1 \
    batch_size=1024 steps=125100 dino={} mae={} \
    crops.num_local=8 crops.local_size=96 \
    optim.weight_decay=0.04 optim.weight_decay_end=0.4 \
    checkpoint.every=2500 knn.every=12510

sslvit submit --launch "$LAUNCH" --follow ${DRY:-} evaluate --encoder "$OUT" --train-dataset "$TRAIN" --val-dataset "$VAL" \
    --protocol knn,linear --output-dir "$OUT"
