#!/bin/bash
# Fetches the release from the stack's bucket, checks it, and hands over to its boot.sh. Where that
# fails, says why, abandons the launch and ends. Fn::Sub fills in what is in braces: docs/contributing/boot.md.
set -euo pipefail
umask 022
mkdir -p /opt/batchlab/boot /opt/batchlab/releases /var/log/batchlab
exec > >(tee -a /var/log/batchlab/boot.log) 2>&1

cat > /opt/batchlab/boot/settings <<'END'
ROLE='${Role}'
GROUP='${Group}'
STACK='${AWS::StackName}'
REGION='${AWS::Region}'
BUCKET='${Bucket}'
RELEASE='${Release}'
LOG_GROUP='${LogGroup}'
CONTAINER_IMAGE='${ContainerImage}'
POOL_IMAGE='${OwnImage}'
GPUS='${Gpus}'
INSTANCE=
END

cat > /opt/batchlab/boot/deployment.json <<'END'
${Deployment}
END

cat > /opt/batchlab/boot/failed.sh <<'END'
#!/bin/bash
# failed.sh REASON: say why this instance does not work, abandon its launch, power it off.
set -u
. /opt/batchlab/boot/settings
export AWS_DEFAULT_REGION=$REGION AWS_PAGER=
log=/var/log/batchlab/boot.log
sleep 1 # what was said last is still on its way into the file
text="$INSTANCE of $GROUP does not come up as a $ROLE: $1."
echo "$text" >> "$log"
[ -w /dev/console ] && echo "batchlab: $text" > /dev/console

if [ -n "$LOG_GROUP" ]; then
  events=$(mktemp)
  tail -n 200 "$log" | python3 -c 'import json, sys, time
text = sys.stdin.buffer.read().decode(errors="replace")[-100000:]
print(json.dumps([{"timestamp": int(time.time() * 1000), "message": text}]))' > "$events"
  stream=$INSTANCE/failed
  timeout 30 aws logs create-log-stream --log-group-name "$LOG_GROUP" --log-stream-name "$stream"
  timeout 30 aws logs put-log-events --log-group-name "$LOG_GROUP" --log-stream-name "$stream" \
    --log-events "file://$events" > /dev/null || echo 'the log group does not take it'
fi

timeout 60 aws autoscaling complete-lifecycle-action --auto-scaling-group-name "$GROUP" \
  --lifecycle-hook-name batchlab-ready --lifecycle-action-result ABANDON \
  --instance-id "$INSTANCE" || echo 'there is no launch to abandon'

if [ "$ROLE" = worker ]; then
  systemctl poweroff --no-block
else # its group starts another; until then somebody may look
  systemd-run --quiet --on-active=600 systemctl poweroff
fi
END
chmod 0755 /opt/batchlab/boot/failed.sh

step='it does not know who it is'
ended() {
  code=$?
  [ "$code" = 0 ] && return
  sleep 1
  last=$(tail -n 1 /var/log/batchlab/boot.log)
  /opt/batchlab/boot/failed.sh "$step (exit $code: $last)"
}
trap ended EXIT

# The credentials of a new instance profile take seconds.
retry() {
  for pause in 1 2 4 8 15 30; do
    "$@" && return
    echo "trying again in $pause s: $1 $2 $3"
    sleep "$pause"
  done
  "$@"
}

who_am_i() {
  imds=$(printenv AWS_EC2_METADATA_SERVICE_ENDPOINT || echo http://169.254.169.254)
  token=$(curl -sSf -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' \
    "$imds/latest/api/token") &&
    id=$(curl -sSf -m 5 -H "X-aws-ec2-metadata-token: $token" \
      "$imds/latest/meta-data/instance-id") &&
    echo "INSTANCE=$id" >> /opt/batchlab/boot/settings
}

retry who_am_i from its metadata
# shellcheck source=/dev/null
. /opt/batchlab/boot/settings
export AWS_DEFAULT_REGION=$REGION AWS_PAGER=
echo "$INSTANCE of $GROUP becomes a $ROLE of release $RELEASE"

place=/opt/batchlab/releases/$RELEASE
if [ ! -e "$place/boot.sh" ]; then # else the image has brought it
  step='the release cannot be fetched'
  rm -rf "$place.new"
  mkdir "$place.new"
  archive=$place.new/archive
  retry aws s3 cp --only-show-errors "s3://$BUCKET/boot/$RELEASE.tar.gz" "$archive"
  step='the release is not what its name says'
  echo "$RELEASE  $archive" | sha256sum --check --quiet
  step='the release cannot be unpacked'
  tar -xzf "$archive" -C "$place.new"
  rm "$archive"
  mv "$place.new" "$place"
fi
step='the release cannot be installed'
"$place/boot.sh" "$ROLE"
