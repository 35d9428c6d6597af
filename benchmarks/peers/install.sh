#!/bin/sh
# install.sh FOLDER [PYTHON]: make FOLDER/bin/python, for --peers of feed.py and prepare.py.
#
# PYTHON is this project's interpreter with the extra `test` (default: .venv/bin/python). The new one looks into its
# environment and has beside it what the peers import, and no more: resolved by pip they would bring another botocore
# and a torch for CUDA of several gigabytes. So pip resolves nothing here, and versions that matter stand below.
set -eu
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1
ours=${2:-$root/.venv/bin/python}

"$ours" -m venv "$folder"
peers=$("$folder/bin/python" -c "import site; print(site.getsitepackages()[0])")
"$ours" -c "import site; print(site.getsitepackages()[0])" > "$peers/ours.pth"
botocore=$("$ours" -c "import botocore; print(botocore.__version__)")

# streaming and litdata, what they import, and scikit-image for its photographs; then img2dataset and what it imports.
"$folder/bin/python" -m pip install --quiet --no-deps \
    mosaicml-streaming==0.13.0 litdata==0.2.76 scikit-image==0.26.0 tifffile lightning-utilities \
    "boto3==$botocore" s3transfer catalogue zstd brotli python-snappy cramjam \
    img2dataset==1.47.0 albumentations==2.0.8 albucore==0.0.24 simsimd stringzilla wandb fire termcolor exifread

PYTHONPATH="$root:$root/benchmarks" "$folder/bin/python" -c "
import peers.stock_litdata, peers.stock_streaming, img2dataset.resizer, webdataset, skimage, psutil"
echo "$folder/bin/python"
