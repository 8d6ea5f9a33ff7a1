# One image for CPUs, NVIDIA GPUs and TPUs; docs/pods.md shows how to run it.
#
#     docker build --build-arg ACCELERATOR=tpu -t pisa_jax .
FROM python:3.12-slim

ARG ACCELERATOR=cpu
WORKDIR /opt/pisa_jax
COPY . .
# gcp: run directories in buckets. k8s: the pods of a job with GPUs find each other through the Kubernetes API.
# The versions are in setup.cfg.
# hadolint ignore=DL3013
RUN case "$ACCELERATOR" in \
      cpu) extras=gcp ;; \
      cuda) extras=cuda,gcp,k8s ;; \
      tpu) extras=tpu,gcp ;; \
      *) echo "ACCELERATOR is '$ACCELERATOR'; allowed are cpu, cuda and tpu" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir ".[$extras]"

# The user stays root: on TPU hosts the device files belong to it.
WORKDIR /work
ENTRYPOINT ["pisa-sr"]
CMD ["--help"]
