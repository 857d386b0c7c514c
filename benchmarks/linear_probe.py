"""Linear probes of several encoders on several data sets, in one table.

    python benchmarks/linear_probe.py --encoders runs/a vit_small_patch14_dinov2.lvd142m resnet50
        --datasets cifar=TRAIN,VAL pets=TRAIN,VAL [--launch launch/slurm.yaml] [--quick] [--json FILE]
        [--output-dir OUT]

The protocol is DINOv2's grid of heads on frozen features, chosen on 10% of train (sslvit/probes/linear.py); others by
`--protocol linear,linear_mae,logreg`. OUT gets linear_probe.md, .csv, .json and .png; run it again to go on.
"""

import sys

from probe_table import main

if __name__ == "__main__":
    sys.exit(main(["linear"], __doc__.splitlines()[0]))
