#!/bin/sh
# Makes the database on first start, from POSTGRES_USER, POSTGRES_DB and the password in the file
# that POSTGRES_PASSWORD_FILE names.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -U "$POSTGRES_USER" --auth=scram-sha-256 --pwfile="$POSTGRES_PASSWORD_FILE" \
    --encoding=UTF8 --locale=C.UTF-8 >/dev/null
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  if [ "${POSTGRES_DB:-$POSTGRES_USER}" != postgres ]; then
    echo "CREATE DATABASE \"${POSTGRES_DB:-$POSTGRES_USER}\"" |
      postgres --single -j postgres >/dev/null
  fi
fi
exec "$@" -c listen_addresses='*'
