-- Finds receipts by the time of their row, should Redis lose its last entries. Rows of an older system have none.
CREATE INDEX IF NOT EXISTS "relay_outbox_settled" ON "identity"."outbox" USING btree (coalesce(dead_lettered_at, published_at),"id") WHERE stream_entry_id is not null;
