use super::super::Listener;
use super::*;

fn name(socket: &Socket) -> String {
    String::from_utf8(socket.tcp_congestion().unwrap()).unwrap().trim_end_matches('\0').to_owned()
}

#[test]
fn within_a_host_nothing_is_paced_until_it_is_asked_for() {
    let interrupt = Interrupt::new().unwrap();
    let deadline = Some(Instant::now() + Duration::from_secs(20));
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let client = connect(listener.address(), &interrupt, deadline).unwrap();
    let (mut reader, _) = listener.accept(&interrupt, deadline).unwrap().split();
    let (_, mut writer) = client.split();
    let chosen = name(&writer.link.socket);
    writer.set_paced(false);
    // Whether it may be chosen depends on the kernel's modules, on a setting, and on who asks.
    let other = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let unpaced = if other.set_tcp_congestion(UNPACED).is_ok() { "cubic" } else { &chosen };
    assert_eq!(name(&writer.link.socket), unpaced);
    writer.write_all(b"1", deadline).unwrap();
    writer.set_paced(true);
    assert_eq!(name(&writer.link.socket), chosen);
    writer.write_all(b"2", deadline).unwrap();
    let mut received = [0; 2];
    reader.read_exact(&mut received, deadline).unwrap();
    assert_eq!(&received, b"12");
}
