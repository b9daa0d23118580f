//! The workflow of the README, run once: `DATABASE_URL=postgres://... cargo run -p borealis-durable --example order`.

use std::time::Duration;

use borealis_durable::{self as durable, NewRun, Outcome, Pool, Registry, Services, Workflow, worker};
use tokio_util::sync::CancellationToken;

struct Shop {
    pool: Pool,
}

impl Services for Shop {
    fn pool(&self) -> &Pool {
        &self.pool
    }
}

fn order() -> Workflow<Shop> {
    durable::workflow("order", 1)
        .step("reserve", |cx| {
            Box::pin(async move {
                let item: String = cx.input()?;
                let sql = "UPDATE stock SET reserved = reserved + 1 WHERE item = $1";
                sqlx::query(sql).bind(&item).execute(&mut **cx.tx().await?).await?;
                Outcome::next(&item)
            })
        })
        .step("ship", |cx| Box::pin(async move { Outcome::done(&format!("{} is on its way", cx.state::<String>()?)) }))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = Pool::connect(&std::env::var("DATABASE_URL")?).await?;
    durable::setup_alone(&pool).await?;
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS stock (item text PRIMARY KEY, reserved integer NOT NULL DEFAULT 0);
         INSERT INTO stock (item) VALUES ('lamp') ON CONFLICT DO NOTHING;",
    )
    .execute(&pool)
    .await?;
    let new = NewRun { key: Some("order-17".to_owned()), input: "lamp".into(), ..NewRun::default() };
    let started = durable::start(&mut *pool.acquire().await?, &order(), new).await?;
    println!("run {} {}", started.run_id, if started.created { "starts" } else { "was there already" });

    let stop = CancellationToken::new();
    let options = worker::Options::new("worker-1", &pool, &stop);
    let working = tokio::spawn(worker::run(Registry::new([order()]), Shop { pool: pool.clone() }, options, stop.clone()));
    loop {
        let sql = "SELECT state, output #>> '{}' FROM workflow_runs WHERE id = $1";
        let (state, output): (String, Option<String>) = sqlx::query_as(sql).bind(started.run_id).fetch_one(&pool).await?;
        if matches!(state.as_str(), "succeeded" | "failed" | "cancelled") {
            println!("{state}: {}", output.unwrap_or_default());
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let reserved: i32 = sqlx::query_scalar("SELECT reserved FROM stock WHERE item = 'lamp'").fetch_one(&pool).await?;
    println!("reserved: {reserved}");
    stop.cancel();
    working.await?;
    Ok(())
}
