# megatron_atum on NVIDIA's PyTorch container, which brings torch, CUDA, NCCL, apex and Transformer Engine.
#   docker build -t megatron-atum --build-arg BASE=IMAGE .
# IMAGE is a PyTorch image of the NGC catalogue with Python 3.12, under its full name.
ARG BASE
FROM ${BASE}

WORKDIR /opt/megatron-atum
COPY setup.py pyproject.toml LICENSE README.md ./
COPY megatron_atum megatron_atum
COPY tools tools
COPY examples examples
COPY pretrain_atum.py ./

# The container's torch must stay: it is built against the container's CUDA and NCCL. So this package and
# megatron-core go in without their dependencies, and the rest of setup.py's list, with the extras data and logging, with
# torch held fast.
# constraints.txt is for CPU machines and is not used here.
RUN set -e; \
    python -c 'import torch; print("torch==" + torch.__version__)' > /tmp/torch.before; \
    pip install --no-cache-dir --no-deps --no-build-isolation .; \
    python -c 'import re; from importlib.metadata import requires; \
        print(*(r.split(";")[0] for r in requires("megatron_atum") if not re.match(r"(torch|megatron-core)\b", r) \
            and ("extra ==" not in r or re.search("(data|logging).$", r))), sep="\n")' \
        > /tmp/requirements.txt; \
    python -c 'from importlib.metadata import requires; \
        print(*(r for r in requires("megatron_atum") if r.startswith("megatron-core")), sep="\n")' > /tmp/megatron.txt; \
    pip install --no-cache-dir --no-deps -r /tmp/megatron.txt; \
    pip install --no-cache-dir -c /tmp/torch.before -r /tmp/requirements.txt; \
    python -c 'import torch; print("torch==" + torch.__version__)' > /tmp/torch.after; \
    cmp /tmp/torch.before /tmp/torch.after || { echo "the installation changed torch" >&2; exit 1; }; \
    python -c 'import megatron.core, megatron_atum, transformers, webdataset'; \
    rm /tmp/torch.before /tmp/torch.after /tmp/requirements.txt /tmp/megatron.txt

ENTRYPOINT []
CMD ["bash"]
