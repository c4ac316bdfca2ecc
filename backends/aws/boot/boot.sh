#!/bin/bash
# boot.sh ROLE: make this machine a batchlab worker or manager, from the release that lies beside
# this file. With the role "image" it is only installed, for an AMI that boots without fetching it.
# May be run again at any time.
set -euo pipefail
umask 022
release=$(cd "$(dirname "$0")" && pwd -P) # not the link that it may be called by
role=${1:-}
boot=/opt/batchlab/boot
home=/var/lib/batchlab
logs=/var/log/batchlab

# shellcheck source=/dev/null
. "$release/version"
CONTAINER_IMAGE='' POOL_IMAGE='' GPUS=0 LOG_GROUP='' REGION=''
if [ "$role" != image ]; then
  # shellcheck source=/dev/null
  . "$boot/settings"
  export AWS_DEFAULT_REGION=$REGION
  [ -z "$POOL_IMAGE" ] || CONTAINER_IMAGE=$POOL_IMAGE
fi

fail() {
  echo "$*" >&2
  exit 1
}

retry() {
  local pause
  for pause in 1 2 4 8 15; do
    "$@" && return
    echo "trying again in $pause s: $*"
    sleep "$pause"
  done
  "$@"
}

# Amazon's own repositories lie in S3; no other registry is asked.
need() { # program, package
  command -v "$1" > /dev/null && return
  if command -v dnf > /dev/null; then
    retry dnf install -y -q "$2"
  fi
  command -v "$1" > /dev/null ||
    fail "this image has no $1, and no repository of Amazon's has brought it"
}

make_user() {
  id batchlab > /dev/null 2>&1 ||
    useradd --system --user-group --home-dir "$home" --no-create-home \
      --shell /usr/sbin/nologin batchlab
  install -d -o batchlab -g batchlab -m 0750 "$home" "$home/aws"
  install -d -m 0755 "$boot" "$logs" /etc/batchlab
  touch /etc/batchlab/environment
}

install_wheels() {
  [ "$(uname -m)" = "$ARCHITECTURE" ] ||
    fail "the release is for $ARCHITECTURE, and this machine is $(uname -m)"
  need "python$PYTHON" "python$PYTHON"
  if [ ! -e "$release/installed" ]; then
    rm -rf "$release/venv"
    "python$PYTHON" -m venv --without-pip "$release/venv"
    # A wheel of pip is a program too, so the machine's Python need not have one.
    local pip=("$release"/wheels/pip-*.whl)
    "$release/venv/bin/python" "${pip[0]}/pip" install --quiet \
      --no-index --no-cache-dir --disable-pip-version-check --root-user-action ignore \
      --find-links "$release/wheels" --requirement "$release/packages.txt" "batchlab==$VERSION"
    touch "$release/installed"
  fi
  ln -sfn "$release" /opt/batchlab/current
}

# Docker gives GPUs to containers with NVIDIA's toolkit, which Amazon's repositories do not have.
need_gpu_toolkit() {
  command -v nvidia-container-runtime-hook > /dev/null || command -v nvidia-ctk > /dev/null ||
    fail "the machine image has no NVIDIA Container Toolkit, so the workers' container cannot use the GPUs of the pool:" \
      "set WorkerImage to an AMI with the toolkit, such as AWS's Deep Learning Base AMI"
}

pull_image() {
  need docker docker
  systemctl start docker
  export DOCKER_CONFIG=$boot/docker
  local registry=${CONTAINER_IMAGE%%/*}
  if [[ $registry == *.dkr.ecr.*.amazonaws.com* ]]; then
    aws ecr get-login-password | docker login --username AWS --password-stdin "$registry"
  fi
  docker image inspect "$CONTAINER_IMAGE" > /dev/null 2>&1 ||
    retry docker pull --quiet "$CONTAINER_IMAGE" ||
    fail "the image $CONTAINER_IMAGE cannot be pulled, and Docker's message above has the reason"
  ln -sfn "$release" /opt/batchlab/current
}

# The image of a pool has tools and Python, and the release has batchlab. The image's Python makes a virtual
# environment in the release, which sees the packages of the image.
add_batchlab() {
  local inside=/opt/batchlab/current made=$release/pool-image
  [ "$(cat "$made/of" 2> /dev/null)" != "$CONTAINER_IMAGE" ] || return 0
  rm -rf "$made"
  local pip=("$release"/wheels/pip-*.whl)
  in_image() { # entry point, arguments
    docker run --rm --pull never --network none --user 0:0 --read-only --tmpfs /tmp \
      --volume "$release:$inside" --entrypoint "$1" "$CONTAINER_IMAGE" "${@:2}"
  }
  in_image "python$PYTHON" -m venv --without-pip --system-site-packages "$inside/pool-image" ||
    fail "the image $CONTAINER_IMAGE has no python$PYTHON with the module venv"
  in_image "$inside/pool-image/bin/python" "$inside/wheels/${pip[0]##*/}/pip" install --quiet \
    --no-index --no-cache-dir --disable-pip-version-check --root-user-action ignore \
    --find-links "$inside/wheels" --requirement "$inside/packages.txt" "batchlab==$VERSION" ||
    fail "batchlab $VERSION cannot be installed in the image $CONTAINER_IMAGE"
  echo "$CONTAINER_IMAGE" > "$made/of"
}

# The same command in a container: systemd stays in charge of when it starts, drains and ends.
write_container_unit() {
  local command options name=batchlab-$role
  local gone="/bin/sh -c 'if docker container inspect $name > /dev/null 2>&1; then docker rm --force --volumes $name; fi'"
  command=$(sed -n 's|^ExecStart=/opt/batchlab/current/venv/bin/batchlab ||p' \
    "$release/units/batchlab-$role.service")
  options=(
    --rm --pull never --name "$name" --network host --workdir "$home"
    --user "$(id -u batchlab):$(id -g batchlab)"
    --cap-drop ALL --security-opt no-new-privileges --read-only
    --tmpfs '/tmp:rw,exec,nosuid,nodev,mode=1777'
    --volume "$home:$home" --volume "$release:/opt/batchlab/current:ro"
    --env "HOME=$home" --env PYTHONUNBUFFERED=1
    --env-file "$boot/environment" --env-file /etc/batchlab/environment
    # What it says is in the unit's log; the engine's own copy would grow without end.
    --log-driver none
  )
  [ "$role" = manager ] || options+=(--env "BATCHLAB_POOL_IMAGE=$CONTAINER_IMAGE")
  [ -z "$POOL_IMAGE" ] || options+=(--entrypoint /opt/batchlab/current/pool-image/bin/batchlab)
  [ "$GPUS" = 0 ] || options+=(--gpus all)
  # As the manager's unit has it: a folder on the disk, which goes with the container.
  [ "$role" = worker ] || options+=(--volume /var/tmp --env TMPDIR=/var/tmp)
  install -d "/etc/systemd/system/batchlab-$role.service.d"
  cat > "/etc/systemd/system/batchlab-$role.service.d/container.conf" <<END
[Unit]
Requires=docker.service
After=docker.service

[Service]
User=root
Group=root
# Else the home would become this user's, and the container's could not read it.
StateDirectory=
WorkingDirectory=/
Environment=DOCKER_CONFIG=$boot/docker
ExecStartPre=-$gone
ExecStart=
ExecStart=/usr/bin/docker run ${options[*]} $CONTAINER_IMAGE $command
# Where the time to stop has run out only the client is killed.
ExecStopPost=-$gone
END
}

write_settings() {
  local ca=''
  [ ! -e "$release/database-ca.pem" ] || ca=/opt/batchlab/current/database-ca.pem
  sed "s|@DATABASE_CA@|$ca|" "$boot/deployment.json" > "$home/aws/deployment.json.new"
  install -o batchlab -g batchlab -m 0640 "$home/aws/deployment.json.new" "$home/aws/deployment.json"
  rm "$home/aws/deployment.json.new"
  echo "AWS_DEFAULT_REGION=$REGION" > "$boot/environment"
  [ ! -e "$release/environment" ] || cat "$release/environment" >> "$boot/environment"
}

install_units() {
  install -m 0644 "$release/units/batchlab-$role.service" "$release/units/batchlab-failed.service" \
    /etc/systemd/system/
  if [ -n "$CONTAINER_IMAGE" ]; then
    write_container_unit
  else
    rm -f "/etc/systemd/system/batchlab-$role.service.d/container.conf"
  fi
  if [ -d /etc/logrotate.d ]; then
    install -m 0644 "$release/logrotate.conf" /etc/logrotate.d/batchlab
  fi
  systemctl daemon-reload
  systemctl enable --quiet "batchlab-$role.service"
  systemctl start "batchlab-$role.service"
}

# Without it the instance works all the same; its logs stay on its disk.
ship_logs() {
  local agent=/opt/aws/amazon-cloudwatch-agent
  [ -n "$LOG_GROUP" ] || return 0
  if [ ! -x "$agent/bin/amazon-cloudwatch-agent-ctl" ] && command -v dnf > /dev/null; then
    dnf install -y -q amazon-cloudwatch-agent || true
  fi
  if [ ! -x "$agent/bin/amazon-cloudwatch-agent-ctl" ]; then
    echo "there is no CloudWatch agent here, so logs stay in $logs"
    return 0
  fi
  sed -e "s|@LOG_GROUP@|$LOG_GROUP|" -e "s|@ROLE@|$role|" "$release/cloudwatch-agent.json" \
    > "$boot/cloudwatch-agent.json"
  "$agent/bin/amazon-cloudwatch-agent-ctl" -a fetch-config -m ec2 -s \
    -c "file:$boot/cloudwatch-agent.json" ||
    echo "the CloudWatch agent does not start, so logs stay in $logs"
}

case $role in
  image)
    make_user
    install_wheels
    echo "batchlab $VERSION is in this image"
    ;;
  worker | manager)
    make_user
    [ -z "$CONTAINER_IMAGE" ] || [ "$GPUS" = 0 ] || need_gpu_toolkit
    if [ -n "$CONTAINER_IMAGE" ]; then pull_image; else install_wheels; fi
    [ -z "$POOL_IMAGE" ] || add_batchlab
    write_settings
    install_units
    echo "the $role of batchlab $VERSION is started"
    ship_logs
    ;;
  *) fail "usage: boot.sh worker|manager|image" ;;
esac
