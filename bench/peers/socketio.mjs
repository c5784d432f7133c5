// The same broker on Socket.IO: its own rooms and `io.to(room).emit`, WebSocket transport only, so that
// neither polling nor the upgrade from it counts against it.

import { createServer } from "node:http";
import { Server } from "socket.io";

const server = createServer();
const io = new Server(server, { transports: ["websocket"], serveClient: false, perMessageDeflate: false });

// Its own documentation's advice on memory: the request is not needed any more.
io.engine.on("connection", (connection) => {
  connection.request = null;
});

io.on("connection", (socket) => {
  socket.on("join", (room, acknowledge) => {
    socket.join(room);
    acknowledge?.();
  });
  socket.on("publish", ({ room, event, data }) => {
    io.to(room).emit("event", { room, event, data, ts: Date.now() / 1000 });
  });
  socket.on("ask", (acknowledge) => acknowledge());
});

server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
  console.log(`ready ws://127.0.0.1:${server.address().port}/socket.io/`);
});
process.on("SIGTERM", () => process.exit(0));
