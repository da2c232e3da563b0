use super::*;

#[test]
fn what_follows_the_answer_to_the_negotiation_reaches_the_client() {
    for _ in 0..200 {
        let events = Events::default();
        let (stream, _client) = UnixStream::pair().unwrap();
        let (connection, messages, _connected) = events.add_client(stream);
        events.emit(&Event::Stop);
        let others = events.clone();
        // Brings an event about as soon as it sees the answer.
        let client = std::thread::spawn(move || {
            let answer = loop {
                if let Ok(message) = messages.try_recv() {
                    break message;
                }
            };
            others.emit(&Event::Resume);
            (answer.line, messages.try_recv().map(|message| message.line))
        });
        assert!(events.begin(&connection, &json!({ "return": {} })));
        let (answer, event) = client.join().unwrap();
        assert_eq!(*answer, *b"{\"return\":{}}\r\n");
        assert!(String::from_utf8_lossy(&event.expect("an event")).contains("RESUME"));
    }
}

#[test]
fn a_client_that_reads_no_answer_before_it_negotiates_is_dropped_and_holds_nobody_up() {
    let events = Events::default();
    let (stream, _client) = UnixStream::pair().unwrap();
    let (connection, _messages, _connected) = events.add_client(stream);
    while !connection.queue.is_full() {
        assert!(connection.send(&json!({ "error": {} })));
    }
    assert!(!events.begin(&connection, &json!({ "return": {} })));
    events.emit(&Event::Stop);
}
