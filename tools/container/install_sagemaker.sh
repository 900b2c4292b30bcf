#!/bin/sh
# Installs SageMaker's training toolkit, whose program `train` SageMaker starts containers with. A step of the Dockerfile.
#
#   install_sagemaker.sh WANTED     1, or 0 to do nothing; sagemaker_toolkit.txt has the versions
#
# It gets an environment of its own, since it asks for versions that the training does not run with. It starts torchrun,
# which it finds on the PATH: the base's.
set -eu
wanted=$1

case $wanted in
0) echo "install_sagemaker: SAGEMAKER=0, so this image has no program train"; exit 0 ;;
1) ;;
*) echo "install_sagemaker: SAGEMAKER=$wanted must be 1 or 0" >&2; exit 1 ;;
esac
python -m venv --without-pip /opt/sagemaker
# The base's constraints (PIP_CONSTRAINT) are for the base's packages.
env -u PIP_CONSTRAINT pip --python /opt/sagemaker/bin/python install --no-cache-dir -r "$(dirname "$0")/sagemaker_toolkit.txt"
/opt/sagemaker/bin/python -c 'import sagemaker_training.cli.train, sagemaker_pytorch_container.training'
ln -s /opt/sagemaker/bin/train /usr/local/bin/train
