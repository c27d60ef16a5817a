# lit_eemllm in a container. The current folder is what it works in:
#
#   docker build --tag lit-eemllm .
#   docker run --rm -it --user "$(id -u)" --volume "$PWD:/work" lit-eemllm demo
#
# PyTorch is the build that pip finds, as everywhere (README.md, Dependencies). For another, of a CPU (small) or of a certain CUDA, give the
# address of its wheels, which PyTorch's installation page has, or an image that has it already; then `docker run --gpus all`:
#
#   docker build --build-arg TORCH_INDEX=... .
#   docker build --build-arg BASE=... --build-arg EXTRAS=video,eval,serve,qlora,liger,xformers .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=""
ARG EXTRAS=video,eval,serve
# The sources are there for this command alone, and not in the image.
RUN --mount=type=bind,target=/src,rw \
    pip install --no-cache-dir --constraint /src/constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "/src[${EXTRAS}]" \
    && useradd --create-home --home-dir /work --uid 1000 user
# Caches go where the work is, whoever does it.
ENV HOME=/work
WORKDIR /work
USER 1000
ENTRYPOINT ["lit-eemllm"]
CMD ["--help"]
