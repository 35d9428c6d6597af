"""BiT-R50x1 on ImageNet-21k, 90 epochs: the convolutional baseline, trained as the ViT paper trains it (appendix D.1).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py bit_r50x1_in21k --data.shards s3://... --to s3://...`
Size: 68,252,561 parameters, the head's among them.
Cost: about 27.7 exaFLOPs, some 2.6 A100-days at 40 % of the bf16 peak.
Expected: the paper has no such row; after 7 epochs of JFT-300M top-1 on ImageNet is 77.54 % (table 6). Not run here.
"""

from pipeline.architectures.bit import bit_r50x1
from pipeline.config import Config, Data, Optim

config = Config(
    name="bit_r50x1_in21k",
    classes=21_841,
    model=bit_r50x1,
    data=Data(samples=12_400_000, lanes=512, window=2048, scaling="bilinear"),
    optim=Optim(lr=1e-3, warmup=10_000, weight_decay=0.1, clip=1.0),
    micro_batch=128,
)
