# The two images of finetune-operator. Works the same with BuildKit and with buildah:
#
#   docker build --target operator --tag REGISTRY/finetune-operator:TAG .
#   docker build --target trainer  --tag REGISTRY/finetune-trainer:TAG .
#
# Dependencies come before code, so a code change rebuilds and ships only the last small layer. docs/images.md says more.

# Any Debian-like base with `python3` >= 3.11 and CA certificates; pin it by digest for releases.
ARG BASE=python:3.11-slim-bookworm

# ---- operator --------------------------------------------------------------------------------------------------------

FROM ${BASE} AS operator-deps
# uv is used where the builder mounts it, else it is fetched for this one step and stays in no layer.
ARG UV_VERSION=0.13.8
# Another package index than the public one, such as a mirror inside a company. Hashes are checked all the same. Its password
# comes as a secret (`--secret id=netrc,src=FILE`), which is there for one step and stays in no layer and no history.
ARG PACKAGE_INDEX=""
COPY requirements/operator.txt /tmp/requirements.txt
# The operator reads and writes plain JSON. The methods that `kubernetes` generates for every API, twice, would be half of
# this layer; they are loaded on demand only, and nobody here demands them.
RUN --mount=type=secret,id=netrc,target=/root/.netrc,required=false \
    set -eu; export UV_DEFAULT_INDEX="${PACKAGE_INDEX}" PIP_INDEX_URL="${PACKAGE_INDEX}" UV_LINK_MODE=copy UV_SYSTEM_CERTS=1; \
    [ -n "${PACKAGE_INDEX}" ] || unset UV_DEFAULT_INDEX PIP_INDEX_URL; \
    [ -d "${UV_CACHE_DIR:-/root/.cache/uv}" ] || export UV_NO_CACHE=1; \
    command -v uv >/dev/null || { python3 -m pip install --quiet --no-cache-dir --target /tmp/uv "uv==${UV_VERSION}"; PATH="/tmp/uv/bin:${PATH}"; }; \
    uv venv --quiet --python "$(command -v python3)" /opt/venv; \
    uv pip install --quiet --python /opt/venv/bin/python --require-hashes -r /tmp/requirements.txt; \
    packages=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
    rm -rf "${packages}/kubernetes/client/api" "${packages}/kubernetes/aio/client/api"; \
    /opt/venv/bin/python -m compileall -q -x '/client/models/v' "${packages}"; \
    echo /app > "${packages}/finetune.pth"; \
    rm -rf /tmp/uv /tmp/requirements.txt; \
    echo "finetune:x:65532:65532::/tmp:/usr/sbin/nologin" >> /etc/passwd; echo "finetune:x:65532:" >> /etc/group

FROM ${BASE} AS operator-code
COPY pyproject.toml deploy/image/seal.py /src/
COPY api/finetune_api /app/finetune_api
COPY operator/finetune_operator /app/finetune_operator
RUN python3 /src/seal.py /src/pyproject.toml /app

FROM operator-deps AS operator
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp USER=finetune LOGNAME=finetune \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
LABEL org.opencontainers.image.title="finetune-operator" \
      org.opencontainers.image.description="Turns FineTuneJobs into torchrun pods" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "finetune_operator"]
COPY --from=operator-code /app /app

# ---- trainer ---------------------------------------------------------------------------------------------------------

FROM ${BASE} AS trainer-deps
ARG UV_VERSION=0.13.8
ARG PACKAGE_INDEX=""
# Empty: the torch of the lock file (CUDA). Else the index of another build of the same version, such as PyTorch's for
# CPU only or for ROCm; torch and what only it needs then come from there, all else from the lock file as ever.
ARG TORCH_INDEX=""
COPY requirements/trainer.txt /tmp/requirements.txt
RUN --mount=type=secret,id=netrc,target=/root/.netrc,required=false \
    set -eu; export UV_DEFAULT_INDEX="${PACKAGE_INDEX}" PIP_INDEX_URL="${PACKAGE_INDEX}" UV_LINK_MODE=copy UV_SYSTEM_CERTS=1; \
    [ -n "${PACKAGE_INDEX}" ] || unset UV_DEFAULT_INDEX PIP_INDEX_URL; \
    [ -d "${UV_CACHE_DIR:-/root/.cache/uv}" ] || export UV_NO_CACHE=1; \
    command -v uv >/dev/null || { python3 -m pip install --quiet --no-cache-dir --target /tmp/uv "uv==${UV_VERSION}"; PATH="/tmp/uv/bin:${PATH}"; }; \
    uv venv --quiet --python "$(command -v python3)" /opt/venv; \
    torch=""; \
    if [ -n "${TORCH_INDEX}" ]; then \
      torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /tmp/requirements.txt); \
      sed -i -E '/^(torch|triton|cuda-|nvidia-)/,/^    # via/d' /tmp/requirements.txt; \
      uv pip install --quiet --python /opt/venv/bin/python --compile-bytecode --index "${TORCH_INDEX}" "${torch}"; \
    fi; \
    uv pip install --quiet --python /opt/venv/bin/python --compile-bytecode --require-hashes --no-deps -r /tmp/requirements.txt; \
    uv pip check --quiet --python /opt/venv/bin/python; \
    echo /app > "$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finetune.pth"; \
    rm -rf /tmp/uv /tmp/requirements.txt; \
    echo "finetune:x:65532:65532::/tmp:/usr/sbin/nologin" >> /etc/passwd; echo "finetune:x:65532:" >> /etc/group

FROM ${BASE} AS trainer-code
COPY pyproject.toml deploy/image/seal.py /src/
COPY api/finetune_api /app/finetune_api
COPY storage/finetune_storage /app/finetune_storage
COPY trainer/finetune_trainer /app/finetune_trainer
RUN python3 /src/seal.py /src/pyproject.toml /app

FROM trainer-deps AS trainer
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp USER=finetune LOGNAME=finetune \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
# GKE's device plugin mounts the driver's libraries here and tells no linker of it; elsewhere the folder does not exist.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
LABEL org.opencontainers.image.title="finetune-trainer" \
      org.opencontainers.image.description="Runs one FineTuneJob on the processes of one pod" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "finetune_trainer"]
COPY --from=trainer-code /app /app
