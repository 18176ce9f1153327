# raymoe's image: for the head and the workers of a Ray cluster, for jobs, and for the command line.
#
#   make image                                   # CPUs; TORCH_INDEX=URL names an index of PyTorch's builds for CPUs
#   make image VARIANT=cuda IMAGE=raymoe:cuda
#
# BASE is any Debian or Ubuntu with bash; where it has no Python of its own, the distribution's is installed.
ARG BASE=python:3.11-slim

# ---- everything in a virtual environment, from wheels alone: no compiler, here either
FROM ${BASE} AS build
ARG VARIANT=cpu
ARG TORCH_INDEX=
ARG PIP_ARGS=
RUN python3 -c "import ensurepip, venv" 2>/dev/null || { \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates && \
        rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/raymoe
ENV PATH=/opt/raymoe/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
WORKDIR /src
# What changes seldom comes first: torch, then the other dependencies, then raymoe.
COPY constraints.txt pyproject.toml ./
RUN pip install ${PIP_ARGS} ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --constraint constraints.txt torch && \
    python -c "import sys, torch; cuda = torch.version.cuda; want = sys.argv[1] == 'cuda'; sys.exit(None if \
bool(cuda) == want else f'VARIANT is {sys.argv[1]} and the index gives torch {torch.__version__}: set TORCH_INDEX')" \
    "${VARIANT}"
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt && \
    pip install ${PIP_ARGS} --constraint constraints.txt --requirement requirements.txt
COPY . .
# The project itself is source, which setuptools packs without compiling anything.
RUN PIP_ONLY_BINARY= pip install ${PIP_ARGS} --no-deps .

# ---- what runs
FROM ${BASE}
RUN python3 -c "import ssl" 2>/dev/null || { \
        apt-get update && apt-get install --yes --no-install-recommends python3 ca-certificates && \
        apt-get clean && rm -rf /var/lib/apt/lists/*; }
RUN getent passwd 1000 >/dev/null || useradd --uid 1000 --user-group --home-dir /home/ray --shell /bin/bash ray; \
    mkdir -p /home/ray && chown 1000:1000 /home/ray
COPY --from=build /opt/raymoe /opt/raymoe
# The root file system may be read-only: what is written goes to /tmp and to HOME, which are volumes then.
ENV PATH=/opt/raymoe/bin:$PATH \
    HOME=/home/ray \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/ray
USER 1000:1000
RUN raymoe --version && ray --version && ! command -v cc && ! command -v gcc && ! command -v c++
CMD ["raymoe", "--help"]
