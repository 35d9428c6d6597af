"""DeiT-S/16 on ImageNet, 300 epochs (Touvron et al. 2021, table 9).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py deit_s16_in1k --data.shards s3://... --to s3://...`
Size: 22,050,664 parameters, the head's among them.
Cost: about 10.6 exaFLOPs, some 24 A100-hours at 40 % of the bf16 peak.
Expected: top-1 79.9 % (the paper and its released weights). Not run here. The code's colour jitter is never applied:
timm leaves it out where there is RandAugment.
"""

from pipeline.architectures.vit import deit_s16
from pipeline.config import Augment, Config, Data, Optim

config = Config(
    name="deit_s16_in1k",
    classes=1000,
    model=deit_s16,
    data=Data(samples=1_281_167, lanes=256, crop_area=0.08),
    augment=Augment(layers=2, magnitude=9.0, space="deit", mixup=0.8, cutmix=1.0, erase=0.25, repeats=3),
    optim=Optim(lr=1e-3, warmup=6_250, decay="cosine", weight_decay=0.05, decayed="matrices", clip=0.0),
    objective="softmax",
    smoothing=0.1,
    duration=300.0,
    batch=1024,
    micro_batch=128,
)
