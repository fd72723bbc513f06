-- Finds rows with an entry by their time, should Redis lose its last entries. Rows of an older system have none.
CREATE INDEX IF NOT EXISTS "relay_outbox_with_entry" ON "identity"."outbox" USING btree (coalesce(dead_lettered_at, published_at),"id") WHERE stream_entry_id is not null;
