"""R50+ViT-B/16 on ImageNet-21k, 90 epochs (ViT paper, section 3.1 and table 3, whose rates are those of ViT-B).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py r50_vit_b16_in21k --data.shards s3://... --to s3://...`
Size: 115,276,433 parameters, the head's among them.
Cost: about 144 exaFLOPs, some 13 A100-days at 40 % of the bf16 peak.
Expected: top-1 on ImageNet 85.08 % after fine-tuning at 384 pixels (the paper's code; with dropout). Not run here.
"""

from dataclasses import replace

from pipeline.architectures.hybrid import r50_b16
from pipeline.config import Config, Data, Optim

config = Config(
    name="r50_vit_b16_in21k",
    classes=21_841,
    model=replace(r50_b16, representation=True, dropout=0.1),
    data=Data(samples=12_400_000, lanes=512, window=2048, scaling="bilinear"),
    optim=Optim(lr=1e-3, warmup=10_000, weight_decay=0.03, clip=1.0),
    micro_batch=128,
)
