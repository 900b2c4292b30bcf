# Megatron-ATUM on NVIDIA's PyTorch image, which brings torch, CUDA, NCCL, Transformer Engine and apex.
#
#   docker build -t megatron-atum --build-arg BASE=IMAGE --build-arg EFA_SHA256=DIGEST .
#
# IMAGE is a PyTorch image of the NGC catalogue with Python 3.12, under its full name, best with its digest. DIGEST is the
# SHA-256 of the EFA installer that you have checked; EFA=0 leaves EFA out, for machines that are not AWS's. Everything
# else has its version here or in tools/container/, packages for training with checksums.
# docs/cluster-runbook.md has the whole way. The steps are scripts of tools/container/.
ARG BASE
FROM ${BASE}

# AWS's network: https://efa-installer.amazonaws.com/aws-efa-installer-1.48.0.tar.gz, with its signature beside it (.sig).
# From 1.47 on the installer brings the plug-in that NCCL needs. EFA_SHA256 has no default: a checksum counts only for
# somebody who has checked the signature, and nobody has done so for this file.
ARG EFA=1
ARG EFA_VERSION=1.48.0
ARG EFA_SHA256=
ARG EFA_URL=https://efa-installer.amazonaws.com

# The wheel for Python 3.12 on x86-64. setup.py must allow the version.
ARG MEGATRON_CORE=0.16.1
ARG MEGATRON_CORE_SHA256=3fb26cb407aa3c4b609c08664022c08146f1648b3d6f2ef2bbe9d3b1294ace61

# SAGEMAKER=1 adds the program that SageMaker starts a container with (tools/container/sagemaker_toolkit.txt); Slurm and
# torchrun do not need it.
ARG SAGEMAKER=0

WORKDIR /opt/megatron-atum

# The plug-in is found here before another of the same name that the base may have.
ENV LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu:/opt/amazon/efa/lib:${LD_LIBRARY_PATH}
COPY tools/container/install_efa.sh tools/container/
RUN sh tools/container/install_efa.sh "${EFA}" "${EFA_VERSION}" "${EFA_SHA256}" "${EFA_URL}"

ENV SAGEMAKER_TRAINING_MODULE=sagemaker_pytorch_container.training:main
COPY tools/container/install_sagemaker.sh tools/container/sagemaker_toolkit.txt tools/container/
RUN sh tools/container/install_sagemaker.sh "${SAGEMAKER}"

# What setup.py wants, as tools/container/requirements.txt pins it. The base's torch, Transformer Engine, apex and numpy
# belong together and are held fast. constraints.txt is for CPU machines and is not used.
COPY tools/container tools/container
RUN sh tools/container/install_requirements.sh "${MEGATRON_CORE}" "${MEGATRON_CORE_SHA256}"

# The repository last: a change of the code builds only from here on. REVISION is its commit, which runs print.
ARG REVISION=
COPY setup.py pyproject.toml LICENSE README.md pretrain_atum.py ./
COPY megatron_atum megatron_atum
COPY tools tools
COPY examples examples
RUN echo "commit ${REVISION:-unknown}" >megatron_atum/REVISION \
    && pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python tools/container/self_check.py --efa "${EFA}" --megatron-core "${MEGATRON_CORE}"

ARG BASE
LABEL org.opencontainers.image.title="Megatron-ATUM" \
      org.opencontainers.image.description="Flamingo-style vision-language training with 3D parallelism" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

# The base's entrypoint stays: it lets the image run on a driver that is older than its CUDA, and then runs its arguments.
