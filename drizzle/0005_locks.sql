-- Nobody writes into these. Pods lock them, which takes a right ("relay grants"): any log-in may take an advisory lock.
CREATE TABLE IF NOT EXISTS "identity"."relay_claim_lock" (
	"unused" boolean
);
--> statement-breakpoint
CREATE TABLE IF NOT EXISTS "identity"."relay_epoch_lock" (
	"unused" boolean
);
--> statement-breakpoint
CREATE TABLE IF NOT EXISTS "identity"."relay_prune_lock" (
	"unused" boolean
);
