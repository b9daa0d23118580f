//! The page about the API, as somebody sees it who wants to learn how to call it.

use std::time::Duration;

use borealis_tests::{Browser, Processes, TestEngine, eventually};
use serde_json::json;

#[tokio::test]
async fn one_can_learn_from_the_page_how_to_call_an_operation() {
    let engine = TestEngine::start().await;
    let mut processes = Processes::new();
    let browser = Browser::start(&mut processes).await;
    // The tag and the operation are in the address: what a colleague was sent.
    let address = "/api/docs#/Scheduled%20Jobs/post_scheduled_jobs_id_rerun";
    browser.open(&engine.base.join(address).expect("a URL")).await;
    let text = async || {
        let shown = "(async () => [document.body.innerText, ...[...document.querySelectorAll('textarea')].map(one => one.value)].join('\\n'))";
        let text = browser.call(shown, json!([])).await;
        text.as_str().unwrap_or_default().to_owned()
    };
    let shown = eventually("the operation is shown", Duration::from_secs(30), async || {
        let text = text().await;
        (text.contains("allow_overlap") && text.contains("occurrence_in_progress")).then_some(text)
    })
    .await;
    for part in
        ["/api/scheduled_jobs/{id}/rerun", "Run an enabled job now", "Idempotency-Key", "Scope of an API token", "409", "503"]
    {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert!(!shown.contains("[object"), "{shown}");
    // It can be tried out from there: without a session the engine refuses.
    let tried = r#"(async () => {
        const id = document.querySelector('.opblock.is-open input[placeholder="id"]');
        Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(id, '1');
        id.dispatchEvent(new Event('input', { bubbles: true }));
        await new Promise(done => setTimeout(done, 1000));
        document.querySelector('.opblock.is-open .execute').click();
        return 'sent';
    })"#;
    assert_eq!(browser.call(tried, json!([])).await, json!("sent"));
    let answered = "(async () => (document.querySelector('.opblock.is-open .responses-wrapper') || {}).innerText || '')";
    eventually("the answer is shown", Duration::from_secs(30), async || {
        let text = browser.call(answered, json!([])).await;
        let text = text.as_str().unwrap_or_default();
        // As the body of an answer has it; the description of the operation names the code otherwise.
        text.contains("\"error\": \"unauthorized\"").then_some(())
    })
    .await;

    // The page of an operation for administrators says that.
    let address = "/api/docs#/Sites/post_sites";
    browser.open(&"about:blank".parse().expect("a URL")).await;
    browser.open(&engine.base.join(address).expect("a URL")).await;
    eventually("who may call it is shown", Duration::from_secs(30), async || {
        text().await.contains("Needs the Admin role").then_some(())
    })
    .await;
}
