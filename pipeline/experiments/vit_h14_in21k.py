"""ViT-H/14 on ImageNet-21k, 90 epochs (paper, table 5; table 3 has no row for it: the rates are those of ViT-L).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py vit_h14_in21k --data.shards s3://... --to s3://...`
Size: 660,382,801 parameters, the head's among them.
Cost: about 1,120 exaFLOPs, some 105 A100-days at 40 % of the bf16 peak.
Expected: top-1 on ImageNet 85.13 % after fine-tuning at 384 pixels (paper, table 5).
"""

from dataclasses import replace

from pipeline.architectures.vit import vit_h14
from pipeline.config import Config, Data, Optim

config = Config(
    name="vit_h14_in21k",
    classes=21_841,
    model=replace(vit_h14, representation=True, dropout=0.1),
    data=Data(samples=12_400_000, lanes=512, window=2048, scaling="bilinear"),
    optim=Optim(lr=1e-3, warmup=10_000, weight_decay=0.03, clip=1.0),
    micro_batch=64,
)
