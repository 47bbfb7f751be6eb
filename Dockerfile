# megatron_slm for CPUs.
#
#     docker build --build-arg TORCH_INDEX=<PyTorch's CPU index> --tag megatron-slm .
#     docker run --rm --volume "$PWD:/work" --user "$(id -u)" megatron-slm demo --output demo
FROM python:3.12-slim-bookworm

ARG TORCH="torch==2.13.0"
# If it is empty, pip installs the build of PyTorch with CUDA.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/tmp

WORKDIR /opt/megatron_slm
# hadolint ignore=DL3013
RUN python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY megatron_slm megatron_slm
# hadolint ignore=DL3013
RUN python -m pip install --constraint constraints.txt .

USER 1000
WORKDIR /work
ENTRYPOINT ["megatron-slm"]
CMD ["--help"]
