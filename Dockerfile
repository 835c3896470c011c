# syntax=docker/dockerfile:1
#
#   docker build --target cuda -t ongrid .
#   docker run --rm --gpus all -v ongrid-runs:/home/ongrid/runs -v ongrid-cache:/home/ongrid/.cache \
#       ongrid train --config sft_qwen3.yaml --qat int8-int4
#
#   docker build --target cpu -t ongrid:cpu --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds> .
#   docker run --rm -v ongrid-runs:/home/ongrid/runs ongrid:cpu train --config quickstart.yaml --qat int8-int4
#
# The volume ongrid-cache keeps what the hub gave. With a folder of yours in place of volumes the
# run has to be yours, too: docker run --rm --user "$(id -u):$(id -g)" -e HOME=/data -v "$PWD:/data" -w /data ongrid:cpu
# train --config my.yaml. `-e HF_TOKEN` hands your token on; `docker stop --timeout 120` leaves time to save the state.
# `docker run --rm --gpus all ongrid quantize doctor` says what such a container can do.
#
# The packages of a lock are a layer of their own, below the source: a change to the source rebuilds seconds of work.

# ---- cuda ------------------------------------------------------------------------------------------------------------
# torch's wheels bring their CUDA libraries, so the smallest CUDA image, with the driver's compatibility layer, is enough.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda-base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc, g++ and Python's headers: triton and torch.compile build their launchers when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev python3.12 python3.12-dev python3.12-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ongrid

FROM cuda-base AS cuda-packages
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3.12 -m venv /opt/venv
COPY requirements/cuda-py312.txt /tmp/lock.txt
# pip compiles what it installs, half a GiB: the user may not write here, and would do it anew in each of a run's processes.
RUN --mount=type=cache,target=/var/cache/pip,sharing=locked \
    /opt/venv/bin/pip install --no-deps -r /tmp/lock.txt

FROM cuda-base AS cuda
COPY --from=cuda-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN --mount=type=bind,target=/src,rw \
    pip install --no-cache-dir --no-deps --no-build-isolation /src
USER 10001
WORKDIR /home/ongrid
# The folders exist, and are the user's, before a volume is mounted on them: a new volume takes over its owner.
RUN mkdir runs .cache
ENTRYPOINT ["tini", "--"]
CMD ["train", "--help"]

# ---- cpu -------------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS cpu-base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ongrid

FROM cpu-base AS cpu-packages
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3.11 -m venv /opt/venv
COPY requirements/cpu-py311.txt /tmp/lock.txt
# The import shows a CUDA build of torch here and not in a first run.
RUN --mount=type=cache,target=/var/cache/pip,sharing=locked \
    /opt/venv/bin/pip install --no-deps -r /tmp/lock.txt \
    && { /opt/venv/bin/python -c 'import torch' || { \
        echo "error: pip took a CUDA build of torch; name PyTorch's index of CPU builds:" \
            "docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=<that index> ." >&2; \
        exit 1; \
    }; }

FROM cpu-base AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
RUN --mount=type=bind,target=/src,rw \
    pip install --no-cache-dir --no-deps --no-build-isolation /src
USER 10001
WORKDIR /home/ongrid
RUN mkdir runs .cache
ENTRYPOINT ["tini", "--"]
CMD ["train", "--help"]
