"""ViT-L/16 on ImageNet-21k, 90 epochs (paper, tables 3 and 5).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py vit_l16_in21k --data.shards s3://... --to s3://...`
Size: 326,738,257 parameters, the head's among them.
Cost: about 412 exaFLOPs, some 38 A100-days at 40 % of the bf16 peak.
Expected: top-1 on ImageNet 85.15 % after fine-tuning at 384 pixels (paper, table 5).
"""

from dataclasses import replace

from pipeline.architectures.vit import vit_l16
from pipeline.config import Config, Data, Optim

config = Config(
    name="vit_l16_in21k",
    classes=21_841,
    model=replace(vit_l16, representation=True, dropout=0.1),
    data=Data(samples=12_400_000, lanes=512, window=2048, scaling="bilinear"),
    optim=Optim(lr=1e-3, warmup=10_000, weight_decay=0.03, clip=1.0),
    micro_batch=128,
)
