# Releases: `docker buildx bake` builds both images for each platform, lists what is in them and pushes them.
# The workflow does it for a tag. By hand it needs a multi-platform builder: docs/building.md.
# Each variable is read from the environment; .env is for compose.
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
  # With SOURCE_DATE_EPOCH set to the commit's time, all files get that time. The digest of each image then depends only
  # on the commit, the base image and the labels below.
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
