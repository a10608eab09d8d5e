#!/usr/bin/env bash
# Your photos, a folder per class, and a pretrained timm model: a family of models within half and a quarter of
# its multiply-accumulates.
#
#   ./own_photos.sh my_images            # more options of `nas-kd study` may follow
set -euo pipefail

nas-kd study --model tf_efficientnet_lite0 --pretrained --img-size 160 --budget macs=50% --levels 0.5,1 --data-dir "$@"
