# One image for every service. The build installs into a virtual environment that is copied whole,
# so that neither pip's caches nor the sources' metadata travel with it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Empty takes torch from the default index; https://download.pytorch.org/whl/cpu is the small CPU
# build, which is what a machine without a GPU wants.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/prfaas
COPY constraints.txt /source/
# Torch first: its layer outlives every change of the sources.
RUN /opt/prfaas/bin/pip install --constraint /source/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE /source/
COPY models /source/models
COPY services /source/services
COPY shared /source/shared
RUN /opt/prfaas/bin/pip install --constraint /source/constraints.txt /source
# For this machine's kind of processor; on another one a container compiles them at its start.
RUN NUMBA_CACHE_DIR=/opt/prfaas/kernels /opt/prfaas/bin/python -m shared.compile_kernels \
    && chmod -R a+rX /opt/prfaas/kernels

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/prfaas /opt/prfaas
RUN useradd --system --uid 10001 --no-create-home prfaas && install --directory --owner prfaas /model
ENV PATH=/opt/prfaas/bin:$PATH NUMBA_CACHE_DIR=/opt/prfaas/kernels \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER prfaas
WORKDIR /tmp
CMD ["prfaas", "--help"]
