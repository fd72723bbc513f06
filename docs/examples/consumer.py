"""Reads a stream of the relay as a member of a consumer group, and handles each event once.

- It records its group and `event_id` in the transaction that handles the event, so an event that arrives twice is
  handled once by each group.
- It acknowledges after the commit. What it had not acknowledged when it died is handled by its next start (same
  CONSUMER) or by another member of the group, after CLAIM_IDLE_MS.
- It makes its group again when Redis has lost it. The stream is then read from its first entry; the recorded ids keep
  that from doing anything twice.

Needs redis and psycopg2 (Debian: python3-redis, python3-psycopg2).

    REDIS_URL=redis://localhost:6379 DATABASE_URL=postgresql://localhost/app python3 consumer.py

Without REDIS_URL it reads redis://localhost:6379. Without DATABASE_URL the variables of libpq count (PGHOST and so on).
"""

import json
import os
import signal
import socket
import sys
import time

import psycopg2
import redis

STREAM = os.environ.get("STREAM", "identity.user.v1")
GROUP = os.environ.get("GROUP", "mailer")
# Unique among the running members of the group.
CONSUMER = os.environ.get("CONSUMER", socket.gethostname())
# An entry that was delivered so long ago and is not acknowledged is taken over from its consumer.
CLAIM_IDLE_MS = int(os.environ.get("CLAIM_IDLE_MS", "60000"))
BLOCK_MS = 2_000
BATCH = 100
REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
DATABASE_URL = os.environ.get("DATABASE_URL", "")

TABLES = """
CREATE SCHEMA IF NOT EXISTS mailer;
CREATE TABLE IF NOT EXISTS mailer.handled_events (
  consumer_group text, event_id uuid, handled_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (consumer_group, event_id));
CREATE TABLE IF NOT EXISTS mailer.mails (
  id bigserial PRIMARY KEY, event_id uuid NOT NULL, user_id text NOT NULL, subject text NOT NULL);
"""

stopping = False


def stop(_signal, _frame):
    global stopping
    stopping = True


def log(text):
    print(text, file=sys.stderr, flush=True)


def handle(cursor, event):
    """What this consumer is for. It runs in the transaction that records the event: both are committed, or neither."""
    json.loads(event["payload"])  # numbers beyond 2^53 are exact here
    cursor.execute(
        "INSERT INTO mailer.mails (event_id, user_id, subject) VALUES (%s, %s, %s)",
        (event["event_id"], event["aggregate_id"], f"About {event['event_type']}"),
    )


def handle_once(connection, event):
    """Returns whether the event was new."""
    with connection, connection.cursor() as cursor:  # commits at the end, or rolls back
        # Waits while another consumer of the group handles the same event, and then finds it handled.
        cursor.execute(
            "INSERT INTO mailer.handled_events (consumer_group, event_id) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            (GROUP, event["event_id"]),
        )
        is_new = cursor.rowcount == 1
        if is_new:
            handle(cursor, event)
        return is_new


def handle_entries(streams, connection, entries):
    """Handles entries one by one. One that fails stays pending: it is claimed again after CLAIM_IDLE_MS."""
    for entry_id, event in entries:
        if stopping:
            return
        if entry_id is None:  # Redis 6.2 says so of an entry that was trimmed
            continue
        try:
            if not event:
                log(f"{entry_id} was trimmed before it was handled")
            else:
                known = "" if handle_once(connection, event) else " was handled before"
                print(f"{entry_id} {event['event_type']} {event['event_id']}{known}", flush=True)
            streams.xack(STREAM, GROUP, entry_id)
        except (psycopg2.OperationalError, psycopg2.InterfaceError, redis.RedisError):
            raise  # a server is away: main() connects again
        except Exception as error:
            log(f"{entry_id} failed: {error}")


def create_group(streams):
    try:
        streams.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


def read(streams, after):
    """`after` is an entry id (what this consumer was given and has not acknowledged) or '>' (what nobody was given)."""
    reply = streams.xreadgroup(GROUP, CONSUMER, {STREAM: after}, count=BATCH, block=BLOCK_MS)
    return reply[0][1] if reply else []


def claim_abandoned(streams, connection):
    """Takes over all entries that any consumer of the group, a dead one too, left for CLAIM_IDLE_MS."""
    cursor = "0-0"
    while not stopping:
        reply = streams.xautoclaim(STREAM, GROUP, CONSUMER, CLAIM_IDLE_MS, cursor, count=BATCH)
        cursor, entries = reply[0], reply[1]
        handle_entries(streams, connection, entries)
        if cursor == "0-0":
            return


def consume(streams, connection):
    create_group(streams)
    after = "0"
    while not stopping and (own := read(streams, after)):
        handle_entries(streams, connection, own)
        after = own[-1][0]
    claimed_at = None
    while not stopping:
        if claimed_at is None or (time.monotonic() - claimed_at) * 1000 > CLAIM_IDLE_MS / 2:
            claim_abandoned(streams, connection)
            claimed_at = time.monotonic()
        handle_entries(streams, connection, read(streams, ">"))


def main():
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"reading {STREAM} as {GROUP}/{CONSUMER}", flush=True)
    while not stopping:
        connection = None
        try:
            streams = redis.Redis.from_url(REDIS_URL, decode_responses=True)
            connection = psycopg2.connect(DATABASE_URL)
            with connection, connection.cursor() as cursor:
                cursor.execute(TABLES)
            consume(streams, connection)
        except (psycopg2.Error, redis.RedisError) as error:
            # A server is away, the group is gone (NOGROUP), or another one made the tables meanwhile: begin again.
            log(str(error))
            time.sleep(1)
        finally:
            if connection is not None:
                connection.close()


main()
