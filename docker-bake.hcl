# Releases: `docker buildx bake` builds both images for each platform, with SBOM and provenance, and pushes them.
# The workflow runs it for a tag. By hand, it needs a multi-platform builder: docs/building.md.
# The variables come from the environment; .env is for compose.
variable "IMAGE"        { default = "flask-helloworld" }
variable "VERSION"      { default = "dev" }
variable "REVISION"     { default = "" }
variable "SOURCE"       { default = "" }
# As in compose.yaml.
variable "PYTHON_IMAGE" { default = null }
variable "APP_DIR"      { default = null }
variable "PIP_CONF"     { default = "" }

group "default" {
  targets = ["runtime", "minimal"]
}

target "runtime" {
  target    = "runtime"
  args      = { PYTHON_IMAGE = PYTHON_IMAGE, APP_DIR = APP_DIR }
  secret    = PIP_CONF == "" ? [] : ["id=pip_conf,src=${PIP_CONF}"]
  tags      = ["${IMAGE}:${VERSION}"]
  platforms = ["linux/amd64", "linux/arm64"]
  attest    = ["type=provenance,mode=max", "type=sbom"]
  # Files newer than SOURCE_DATE_EPOCH, the commit's time, get that time. The same commit, base image, labels and
  # BuildKit then give each image the same digest.
  output    = ["type=registry,rewrite-timestamp=true"]
  labels = {
    "org.opencontainers.image.version"  = VERSION
    "org.opencontainers.image.revision" = REVISION
    "org.opencontainers.image.source"   = SOURCE
  }
}

target "minimal" {
  inherits = ["runtime"]
  target   = "minimal"
  tags     = ["${IMAGE}:${VERSION}-minimal"]
}
