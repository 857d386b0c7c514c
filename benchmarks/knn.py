"""k-NN classification by several encoders on several data sets, in one table.

    python benchmarks/knn.py --encoders runs/a runs/b --datasets cifar=TRAIN,VAL pets=TRAIN,VAL
        [--launch launch/slurm.yaml] [--quick] [--json FILE] [--output-dir OUT]

The protocol is DINO's weighted k-NN on frozen features (sslvit/probes/knn.py), k = 20 in the table, k = 10, 100, 200 in
the files. OUT gets knn.md, .csv, .json and .png; run it again to go on.
"""

import sys

from probe_table import main

if __name__ == "__main__":
    sys.exit(main(["knn"], __doc__.splitlines()[0]))
